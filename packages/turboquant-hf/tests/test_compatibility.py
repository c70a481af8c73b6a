"""The report on a model says what happens, and leaves the model as it was."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import LlamaConfig

from turboquant_core import LayoutError
from turboquant_hf import check_model_compatibility, patch_model

from .conftest import CONFIGS, GQA, build


def test_every_family(model: Any) -> None:
    before = model.config._attn_implementation
    report = check_model_compatibility(model)
    assert list(report) == [0, 1]
    assert report[1].path == "fused"
    assert report.not_registered is None
    assert model.config._attn_implementation == before
    assert "prepare_inputs_for_generation" not in vars(model)


def test_uncompressed_and_untouched(falcon: Any) -> None:
    gemma = check_model_compatibility(build(*CONFIGS["gemma2"]), bits=(4, 3))
    assert [layer.path for layer in gemma.values()] == ["uncompressed", "fused"]
    assert "DynamicSlidingWindowLayer" in str(gemma)
    report = check_model_compatibility(falcon)
    assert {layer.path for layer in report.values()} == {"intercepted"}
    assert "does not go through" in str(report)


def test_a_patched_model_stays_patched(llama: Any) -> None:
    patch_model(llama)
    check_model_compatibility(llama)
    assert llama.config._attn_implementation == "turboquant"


@pytest.mark.parametrize(
    ("config", "attention", "error"),
    [(LlamaConfig(**{**GQA, "head_dim": 20}), "sdpa", LayoutError), (LlamaConfig(**GQA), "flex_attention", ValueError)],
    ids=["head_dim", "attention"],
)
def test_refusals_leave_the_model_alone(config: Any, attention: str, error: type[Exception]) -> None:
    model = build(config, attention)
    with pytest.raises(error):
        check_model_compatibility(model)
    assert model.config._attn_implementation == attention
