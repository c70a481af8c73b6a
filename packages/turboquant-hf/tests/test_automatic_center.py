"""Which prompts are centred by ``center_keys="auto"``."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import Gemma2Config, GemmaConfig, GptOssConfig, LlamaConfig

from turboquant_hf.automatic_center import LEAST_TOKENS, LONG_PROMPT, automatic_center, may_center


def prompt(tokens: int, *shares: float) -> Tensor:
    """Keys ``[2, heads, tokens, 64]`` whose mean has the given shares of their energy, one for each head."""
    generator = torch.Generator().manual_seed(tokens)
    noise = torch.randn(2, len(shares), tokens, 64, generator=generator)
    noise -= noise.mean((0, 2), keepdim=True)
    noise /= noise.square().mean((0, 2, 3), keepdim=True).sqrt()
    share = torch.tensor(shares).view(1, -1, 1, 1)
    return noise * (1 - share).sqrt() + share.sqrt()


@pytest.mark.parametrize(
    ("tokens", "share", "centred"),
    [
        (LEAST_TOKENS - 1, 0.99, False),
        (LEAST_TOKENS, 0.9, True),
        (LEAST_TOKENS, 0.8, False),
        (LONG_PROMPT - 1, 0.8, False),
        (LONG_PROMPT, 0.65, True),
        (LONG_PROMPT, 0.55, False),
    ],
)
def test_an_offset_is_removed_where_it_is_large_enough(tokens: int, share: float, centred: bool) -> None:
    keys = prompt(tokens, share)
    center = automatic_center(keys)
    assert (center is not None) == centred
    if center is not None:
        torch.testing.assert_close(center, keys.mean((0, 2)))


def test_each_head_is_judged_alone() -> None:
    keys = prompt(LONG_PROMPT, 0.9, 0.1, 0.7).to(torch.bfloat16)
    center = automatic_center(keys)
    assert center is not None
    assert center.dtype == torch.float32
    assert not center[1].any()
    torch.testing.assert_close(center[[0, 2]], keys.float().mean((0, 2))[[0, 2]])


def test_an_empty_prompt_is_not_centred() -> None:
    assert automatic_center(torch.zeros(1, 2, 0, 64)) is None


def test_models_whose_scores_see_a_centre_keep_their_keys() -> None:
    assert may_center(LlamaConfig())
    assert may_center(GemmaConfig())
    assert not may_center(Gemma2Config())
    assert not may_center(GptOssConfig())
