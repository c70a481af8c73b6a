"""The report on a model says what happens, and leaves the model as it was."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import BloomConfig, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from turboquant_core import LayoutError
from turboquant_hf import check_model_compatibility, patch_model

from .conftest import COMMON, CONFIGS, GQA, build


def test_every_family(model: Any) -> None:
    before = model.config._attn_implementation
    report = check_model_compatibility(model)
    assert list(report.layers) == [0, 1]
    assert report.layers[1].path == "fused"
    assert report["not_registered"] is None
    assert report["compatible"] is True
    assert report["known_compatible"] is True
    assert report["vision_layers_skipped"] == 0
    assert report["rope_detected"] is (model.config.model_type != "gpt2")
    assert model.config._attn_implementation == before
    assert "prepare_inputs_for_generation" not in vars(model)


def test_uncompressed_and_untouched(falcon: Any) -> None:
    gemma = check_model_compatibility(build(*CONFIGS["gemma2"]), bits=(4, 3))
    assert [layer.path for layer in gemma.layers.values()] == ["uncompressed", "fused"]
    assert "DynamicSlidingWindowLayer" in str(gemma)
    assert gemma["unsupported_features"] == ["DynamicSlidingWindowLayer"]
    assert (gemma["eligible_layers"], gemma["head_dim"]) == (1, 32)
    report = check_model_compatibility(falcon)
    assert {layer.path for layer in report.layers.values()} == {"intercepted"}
    assert "does not go through" in str(report)


def test_it_is_a_mapping(llama: Any) -> None:
    report = check_model_compatibility(llama)
    keys = "compatible head_dim eligible_layers rope_detected unsupported_features vision_layers_skipped"
    assert set(keys.split()) < set(report) == set(dict(report))
    assert len(report) == len(dict(report))
    with pytest.raises(KeyError, match="'colour'; the report has compatible, head_dim"):
        report["colour"]


def test_a_decoded_model_is_called_incompatible_and_says_why() -> None:
    report = check_model_compatibility(build(BloomConfig(**COMMON), "eager"))
    assert report["compatible"] is False
    assert {layer.path for layer in report.layers.values()} == {"decoded"}
    assert report["unsupported_features"]
    assert report["rope_detected"] is False


def test_a_vision_tower_is_counted_and_left_alone() -> None:
    text = LlamaConfig(**GQA)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=16, patch_size=8
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=96)
    model = LlavaForConditionalGeneration(config).eval()
    report = check_model_compatibility(model)
    assert (report["vision_layers_skipped"], report["eligible_layers"], report["compatible"]) == (3, 2, True)
    patch_model(model)
    assert model.config.text_config._attn_implementation == "turboquant"
    assert model.config.vision_config._attn_implementation == "sdpa"


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
