"""Blocks that leave the cache and come back: packed pages are bytes that move whole."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from .conftest import TEXT, Engines

PROMPTS = [TEXT[:600], TEXT[1000:1400], "The Congress shall have"]
UNEQUAL = {"prefill": "packed", "boundary_layers": 1, "layers": {"1": {"k_bits": 3, "v_bits": 2}}}
WHOLE: dict[str, Any] = {"max_num_batched_tokens": 2048, "enable_prefix_caching": False}


def transfer(connector: str, **extra: Any) -> dict[str, Any]:
    settings = {"kv_connector": connector, "kv_role": "kv_both", "kv_connector_extra_config": extra}
    return {"kv_transfer_config": settings}


def test_a_prefix_from_a_file_changes_nothing(fresh_engines: Engines, tmp_path: Path) -> None:
    plain = fresh_engines([PROMPTS], UNEQUAL, **WHOLE)
    files = transfer("ExampleConnector", shared_storage_path=str(tmp_path / "blocks"))
    run = fresh_engines([PROMPTS, PROMPTS], UNEQUAL, **files, **WHOLE)
    assert [output["cached"] > 60 for output in run.passes[0]] == 3 * [False]
    assert [output["cached"] > 60 for output in run.passes[1]] == [True, True, False]
    assert run.loaded
    assert run.tokens(0) == run.tokens(1) == plain.tokens()


def test_a_prefix_that_was_offloaded_changes_nothing(fresh_engines: Engines) -> None:
    plain = fresh_engines([PROMPTS], UNEQUAL, **WHOLE)
    others = [TEXT[start : start + 700] for start in range(2000, 9000, 700)]
    offloading = {"kv_offloading_size": 0.1, "enable_prefix_caching": True, "num_gpu_blocks_override": 34}
    run = fresh_engines.unless_vllm_fails([PROMPTS, others, PROMPTS], UNEQUAL, **{**WHOLE, **offloading})
    assert [output["cached"] > 60 for output in run.passes[2]] == [True, True, False]
    assert run.loaded
    assert run.tokens(0) == run.tokens(2) == plain.tokens()


def test_a_block_copied_within_the_cache_is_the_same_bytes() -> None:
    with warnings.catch_warnings():
        # vLLM's imports use what is deprecated.
        warnings.simplefilter("ignore")
        from vllm.v1.worker import utils
    if not hasattr(utils, "copy_kv_cache_blocks_inplace"):
        pytest.skip("this vLLM copies no blocks within its cache")
    # Views as those of two layers of 68 and 44 bytes a token, over int8 memory of their own.
    views = [torch.randint(-128, 127, (6 * 2 * 32 * size,)).to(torch.int8).view(6, 2, 32, size) for size in (68, 44)]
    before = [view.clone() for view in views]
    utils.copy_kv_cache_blocks_inplace(views, 6, [(4, 1), (2, 5)])
    for view, old in zip(views, before, strict=True):
        assert torch.equal(view, old[[0, 4, 2, 3, 4, 2]])


@pytest.mark.parametrize("connector", ["SimpleCPUOffloadConnector", "NixlConnector", "DecodeBenchConnector"])
def test_other_connectors_are_refused(engines: Engines, connector: str) -> None:
    message = f"KV connector '{connector}' may take packed pages of other options for its own"
    assert message in engines.refusal({}, **transfer(connector))
