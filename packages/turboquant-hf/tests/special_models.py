"""Small models whose layers keep a state beside keys and values, and what their tests share."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from turboquant_hf.compat import CACHE_ARGUMENT

from .sweep.shrink import small_model

RECURRENT, INDEXED, CONVOLVED = "falcon_h1", "deepseek_v32", "inkling_text"
"""A Mamba state; keys of an indexer that shows 8 tokens; convolutions alone, beside sliding windows too."""
BATCH, LENGTH = 3, 12


def known(name: str) -> Any:
    return pytest.param(
        name, marks=pytest.mark.skipif(name not in CONFIG_MAPPING_NAMES, reason="not in this release of Transformers")
    )


@cache
def special_model(name: str) -> Any:
    """Of a family; tests that change it take a copy."""
    return small_model(name).model


@torch.no_grad()
def step(model: Any, cache: Any, batch: int = BATCH, tokens: int = 1) -> torch.Tensor:
    """Logits of the next tokens, which depend on their number alone."""
    ids = torch.randint(2, 90, (batch, tokens), generator=torch.Generator().manual_seed(tokens))
    return model(ids, use_cache=True, **{CACHE_ARGUMENT: cache}).logits


def assert_same_steps(model: Any, packed: Any, stock: Any, batch: int = BATCH) -> None:
    assert packed.get_seq_length() == stock.get_seq_length()
    for _ in range(2):
        torch.testing.assert_close(step(model, packed, batch), step(model, stock, batch), rtol=1e-4, atol=1e-4)


def assert_nothing_is_left_after_a_reset(model: Any, packed: Any) -> None:
    """Another prompt gives what it gives over a new stock cache, and so do the steps after it."""
    packed.reset()
    caches = packed, DynamicCache(config=model.config)
    torch.testing.assert_close(*(step(model, cache, BATCH, 7) for cache in caches), rtol=1e-4, atol=1e-4)
    assert_same_steps(model, *caches)
