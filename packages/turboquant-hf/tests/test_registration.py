"""Which models are switched by name, and that switching changes nothing for other caches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    BloomConfig,
    CLIPVisionConfig,
    DeepseekV3Config,
    GPT2Config,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from turboquant_hf import TurboQuantCache, patch_model, unpatch_model
from turboquant_hf.compat import CACHE_ARGUMENT
from turboquant_hf.registration import why_not_registered
from turboquant_hf.verify import decoded_twin

from .conftest import COMMON, GQA, VOCABULARY, build

GPT2 = GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=512, eos_token_id=None)
LATENT = DeepseekV3Config(
    **COMMON,
    intermediate_size=96,
    moe_intermediate_size=32,
    n_routed_experts=4,
    num_key_value_heads=4,
    kv_lora_rank=32,
    q_lora_rank=32,
    qk_rope_head_dim=16,
    qk_nope_head_dim=16,
    v_head_dim=16,
    n_group=1,
    topk_group=1,
    num_experts_per_tok=2,
    first_k_dense_replace=1,
)
BLOOM = BloomConfig(vocab_size=VOCABULARY, hidden_size=64, n_layer=2, n_head=4, eos_token_id=None, pad_token_id=0)


def generate(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    mask = options.pop("attention_mask", torch.ones_like(ids))
    return model.generate(ids, attention_mask=mask, pad_token_id=0, max_new_tokens=8, do_sample=False, **options)


@pytest.mark.parametrize(
    ("config", "attention", "reason"),
    [
        (GPT2, "sdpa", None),
        (GPT2, "eager", "asks whether the attention implementation is 'eager'"),
        (LlamaConfig(**GQA), "sdpa", None),
        (BLOOM, "eager", "does not go through"),
    ],
)
def test_reason(config: Any, attention: str, reason: str | None) -> None:
    model = build(config, attention)
    found = why_not_registered(model)
    assert (found is None) if reason is None else (reason in (found or ""))
    patch_model(model, verify=False)
    assert (model.config._attn_implementation == attention) == (reason is not None)


def test_kernels_that_read_memory_themselves_are_refused() -> None:
    model = build(LlamaConfig(**GQA), "flex_attention")
    with pytest.raises(ValueError, match=r"'flex_attention', which cannot.*set_attn_implementation\('sdpa'\)"):
        patch_model(model)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_static_cache_on_a_patched_model(prompt: torch.Tensor, attention: str) -> None:
    """Its keys have room for tokens to come: a missing mask is aligned to the first key there."""
    model = build(LlamaConfig(**GQA), attention)
    expected = generate(model, prompt, cache_implementation="static")
    patch_model(model)
    assert torch.equal(generate(model, prompt, cache_implementation="static"), expected)


@pytest.mark.parametrize("config", [BLOOM, LATENT], ids=["bloom", "latent-attention"])
@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}, {"prefill_chunk_size": 5}], ids=str)
def test_models_that_need_decoded_keys(config: Any, mode: dict[str, Any]) -> None:
    model = build(config, "eager")
    ids = torch.randint(2, VOCABULARY, (2, 18), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    twin = decoded_twin(TurboQuantCache(model.config), model.config)
    expected = generate(model, ids * mask, attention_mask=mask, **{CACHE_ARGUMENT: twin}, **mode)
    cache = patch_model(model)
    got = generate(model, ids * mask, attention_mask=mask, **{CACHE_ARGUMENT: cache}, **mode)
    assert torch.equal(got, expected)
    paths = {layer.path for layer in cache.summary().layers}
    # Transformers cached expanded keys, not latents, before 5.15.
    assert paths == {"decoded"} or (config is LATENT and paths <= {"fused", "fused+decoded", "decoded"})


def test_the_vision_tower_is_left_alone(prompt: torch.Tensor) -> None:
    vision = CLIPVisionConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8
    )
    config = LlavaConfig(text_config=LlamaConfig(**GQA), vision_config=vision, image_token_index=1)
    torch.manual_seed(0)
    model: Any = LlavaForConditionalGeneration(config).eval()
    cache = patch_model(model)
    assert model.config.text_config._attn_implementation == "turboquant"
    assert model.config.vision_config._attn_implementation == "sdpa"
    generate(model, prompt, **{CACHE_ARGUMENT: cache})
    assert {layer.path for layer in cache.summary().layers} == {"fused"}
    unpatch_model(model)
    assert model.config.text_config._attn_implementation == "sdpa"
