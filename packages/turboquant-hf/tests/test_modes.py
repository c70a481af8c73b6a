"""Ways of generating beyond the plain loop: as the twin, or one clear error."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    CLIPVisionConfig,
    DynamicCache,
    EncoderDecoderCache,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from turboquant_hf import TurboQuantCache, patch_model
from turboquant_hf.compat import CACHE_ARGUMENT
from turboquant_hf.verify import decoded_twin

from .conftest import COMMON, CONFIGS, GQA, UNTOUCHED, VOCABULARY, build

WINDOWS = {"sink_tokens": 2, "recent_tokens": 6}


def pair(model: Any, **options: Any) -> tuple[TurboQuantCache, Any]:
    options = {"page_size": 16, **options}
    return TurboQuantCache(model.config, **options), decoded_twin(
        TurboQuantCache(model.config, **options), model.config
    )


def generate(model: Any, ids: torch.Tensor, cache: Any, **options: Any) -> torch.Tensor:
    torch.manual_seed(0)
    arguments: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, **options}
    return model.generate(ids, **{CACHE_ARGUMENT: cache}, **arguments)


@pytest.mark.parametrize("options", [{}, WINDOWS], ids=["plain", "windows"])
@pytest.mark.parametrize(
    "mode",
    [
        {"num_beams": 2, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
        {"prefill_chunk_size": 6},
        # Transformers 5.5 looks tokens up only where there is an end of sequence.
        {"prompt_lookup_num_tokens": 3, "eos_token_id": 1, "min_new_tokens": 8},
    ],
    ids=["beams", "sampling", "chunks", "lookup"],
)
def test_generate(llama: Any, prompt: torch.Tensor, mode: dict[str, Any], options: dict[str, Any]) -> None:
    patch_model(llama, verify=False)
    packed, twin = (generate(llama, prompt, cache, **mode) for cache in pair(llama, **options))
    assert torch.equal(packed, twin)


def test_assisted_decoding(llama: Any, prompt: torch.Tensor) -> None:
    """The assistant proposes, the packed cache takes several queries and is cropped."""
    assistant = build(*CONFIGS["llama"])
    with torch.no_grad():
        assistant.lm_head.weight.add_(0.05 * torch.randn_like(assistant.lm_head.weight))
    patch_model(llama, verify=False)
    packed, twin = (generate(llama, prompt, cache, assistant_model=assistant) for cache in pair(llama))
    assert torch.equal(packed, twin)


def test_an_unrelated_prompt_is_an_error_with_windows_too(llama: Any, prompt: torch.Tensor) -> None:
    cache = patch_model(llama, verify=False, **WINDOWS)
    generate(llama, prompt, cache)
    with pytest.raises(ValueError, match="start a new cache"):
        generate(llama, torch.cat((prompt, prompt), 1).flip(1), cache)


def test_inference_mode(llama: Any, prompt: torch.Tensor) -> None:
    patch_model(llama, verify=False)
    packed, twin = pair(llama, **WINDOWS)
    with torch.inference_mode():
        for ids in (prompt, prompt[:, :3], prompt[:, :1]):
            got, expected = (llama(ids, **{CACHE_ARGUMENT: cache}).logits for cache in (packed, twin))
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    packed.reorder_cache(torch.tensor([0]))


def test_autocast(llama: Any, prompt: torch.Tensor) -> None:
    patch_model(llama, verify=False)
    packed, twin = pair(llama)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for ids in (prompt, prompt[:, :3], prompt[:, :1]):
            got, expected = (llama(ids, **{CACHE_ARGUMENT: cache}).logits.float() for cache in (packed, twin))
            torch.testing.assert_close(got, expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("options", [{}, WINDOWS, {"compress_v": False}, {"start_after": 30}], ids=str)
def test_gradients_are_not_kept(llama: Any, prompt: torch.Tensor, options: dict[str, Any]) -> None:
    """A cache that was filled outside ``torch.no_grad()`` holds no graphs, and can be copied."""
    patch_model(llama, verify=False)
    packed, twin = pair(llama, **options)
    for ids in (prompt, prompt[:, :3], prompt[:, :1], prompt[:, :20]):
        got, expected = (llama(ids, **{CACHE_ARGUMENT: cache}).logits for cache in (packed, twin))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    got.sum().backward()
    copied = copy.deepcopy(packed)
    with torch.no_grad():
        one, other = (llama(prompt[:, :1], **{CACHE_ARGUMENT: cache}).logits for cache in (packed, copied))
    assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("name", "options"),
    [("llama", {}), ("gemma2", {"compress_sliding": True}), ("falcon", WINDOWS)],
    ids=["plain", "sliding", "untouched"],
)
def test_a_compiled_model_over_pages_that_grow(name: str, options: dict[str, Any], prompt: torch.Tensor) -> None:
    """The graph is broken around every update; what is computed stays the same."""
    model = build(*CONFIGS[name]) if name in CONFIGS else build(UNTOUCHED[name], "sdpa")
    patch_model(model, verify=False)
    caches = [TurboQuantCache(model.config, page_size=16, **options) for _ in range(2)]
    torch._dynamo.reset()
    compiled = torch.compile(model.forward, backend="aot_eager")
    with torch.no_grad():
        for width in (21, *[1] * 9, 4, 18, 1):
            ids = prompt[:, :width]
            got, expected = (
                run(ids, **{CACHE_ARGUMENT: cache}).logits for run, cache in zip((compiled, model), caches, strict=True)
            )
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        torch._dynamo.reset()
        whole = torch.compile(model.forward, backend="aot_eager", fullgraph=True)
        with pytest.raises(Exception, match=r"pages that grow are no part of a graph|torch\.compiler\.disable"):
            whole(prompt, **{CACHE_ARGUMENT: TurboQuantCache(model.config, page_size=16, **options)})


def test_weights_that_are_offloaded(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a model is nowhere by its own account."""
    monkeypatch.setattr(type(llama), "device", torch.device("meta"))
    assert patch_model(llama).verification is not None


def test_threads_with_a_cache_each(llama: Any, prompt: torch.Tensor) -> None:
    patch_model(llama, verify=False)
    prompts = [prompt + shift for shift in range(-1, 3)]
    expected = [llama.generate(ids, **{CACHE_ARGUMENT: pair(llama)[0]}, max_new_tokens=6) for ids in prompts]
    found: dict[int, torch.Tensor] = {}

    def run(index: int) -> None:
        found[index] = llama.generate(prompts[index], **{CACHE_ARGUMENT: pair(llama)[0]}, max_new_tokens=6)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[index], expected[index]) for index in range(len(prompts)))


def seq2seq(name: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """A small random encoder-decoder and its encoder's input."""
    torch.manual_seed(0)
    common: dict[str, Any] = {"decoder_start_token_id": 1, "pad_token_id": 0, "eos_token_id": None, "bos_token_id": 1}
    layers = {"encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    sizes = {"d_model": 64, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": VOCABULARY}
    ids = torch.randint(2, VOCABULARY, (2, 9))
    if name == "t5":
        config = T5Config(vocab_size=VOCABULARY, d_model=64, d_kv=32, num_heads=2, num_layers=2, d_ff=64, **common)
        return T5ForConditionalGeneration(config).eval(), {"input_ids": ids}
    if name == "bart":
        config = BartConfig(**sizes, **layers, max_position_embeddings=64, forced_eos_token_id=None, **common)
        return BartForConditionalGeneration(config).eval(), {"input_ids": ids}
    config = WhisperConfig(
        **sizes, **layers, num_mel_bins=8, max_source_positions=20, max_target_positions=64, **common
    )
    return WhisperForConditionalGeneration(config).eval(), {"input_features": torch.randn(2, 8, 40)}


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
def test_self_attention_of_encoder_decoders(name: str, beams: int) -> None:
    model, inputs = seq2seq(name)
    packed, twin = pair(model)
    caches = [EncoderDecoderCache(cache, DynamicCache()) for cache in (packed, twin)]
    arguments: dict[str, Any] = {"max_new_tokens": 10, "min_new_tokens": 10, "num_beams": beams, "do_sample": False}
    out = [model.generate(**inputs, **{CACHE_ARGUMENT: cache}, **arguments) for cache in caches]
    assert torch.equal(*(getattr(one, "sequences", one) for one in out))
    assert packed.get_seq_length() > 0
    assert packed.memory().compression_ratio > 4


def test_multimodal() -> None:
    """An image goes through the untouched vision tower into the prompt."""
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    torch.manual_seed(0)
    text = LlamaConfig(**{**COMMON, **GQA})
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=96))
    model = model.eval()
    patch_model(model, verify=False)
    ids = torch.cat((torch.full((1, 4), 96), torch.randint(2, 90, (1, 7))), 1)
    pixels = torch.randn(1, 3, 16, 16)
    packed, twin = (generate(model, ids, cache, pixel_values=pixels) for cache in pair(model))
    assert torch.equal(packed, twin)
    assert model.config.vision_config._attn_implementation == "sdpa"
