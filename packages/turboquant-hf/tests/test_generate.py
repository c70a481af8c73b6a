"""Every mode of generate gives, over packed pages, the tokens that the same decoded vectors give in a stock cache."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from turboquant_hf import CacheMemory, TurboQuantCache, patch_model, turboquant, unpatch_model
from turboquant_hf.compat import CACHE_ARGUMENT
from turboquant_hf.verify import decoded_twin

from .conftest import CONFIGS, TINY, build

NEW_TOKENS = 12


def caches(model: Any, **options: Any) -> tuple[TurboQuantCache, Any]:
    """A packed cache, and the stock cache that stores what it decodes to."""
    packed = TurboQuantCache(model.config, 4, page_size=16, **options)
    return packed, decoded_twin(TurboQuantCache(model.config, 4, page_size=16, **options), model.config)


def generate(model: Any, ids: torch.Tensor, cache: Any, **options: Any) -> torch.Tensor:
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, **options}
    mask = options.pop("attention_mask", torch.ones_like(ids))
    return model.generate(ids, attention_mask=mask, pad_token_id=0, **{CACHE_ARGUMENT: cache}, **options)


@pytest.fixture
def padded() -> dict[str, torch.Tensor]:
    """A left-padded batch of three."""
    ids = torch.randint(2, 97, (3, 18), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[1, :7], mask[2, :1] = 0, 0
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.mark.parametrize("patched", [True, False], ids=["patched", "untouched"])
def test_greedy(model: Any, prompt: torch.Tensor, patched: bool) -> None:
    packed, twin = caches(model)
    expected = generate(model, prompt, twin)
    if patched:
        patch_model(model, 4)
    assert torch.equal(generate(model, prompt, packed), expected)


def test_left_padded_batch(model: Any, padded: dict[str, torch.Tensor]) -> None:
    packed, twin = caches(model)
    ids, mask = padded["input_ids"], padded["attention_mask"]
    expected = generate(model, ids, twin, attention_mask=mask)
    patch_model(model, 4)
    assert torch.equal(generate(model, ids, packed, attention_mask=mask), expected)


def test_beams(model: Any, prompt: torch.Tensor) -> None:
    packed, twin = caches(model)
    expected = generate(model, prompt, twin, num_beams=3)
    patch_model(model, 4)
    assert torch.equal(generate(model, prompt, packed, num_beams=3), expected)


def test_several_turns(model: Any, prompt: torch.Tensor) -> None:
    packed, twin = caches(model)
    more = torch.randint(2, 97, (1, 5), generator=torch.Generator().manual_seed(9))
    expected = generate(model, torch.cat((generate(model, prompt, twin), more), 1), twin)
    patch_model(model, 4)
    first = generate(model, prompt, packed)
    assert torch.equal(generate(model, torch.cat((first, more), 1), packed), expected)


def test_chunked_prompt(model: Any, prompt: torch.Tensor) -> None:
    packed, twin = caches(model)
    expected = generate(model, prompt, twin, prefill_chunk_size=6)
    patch_model(model, 4)
    assert torch.equal(generate(model, prompt, packed, prefill_chunk_size=6), expected)


def test_prompt_lookup_crops(llama: Any) -> None:
    ids = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])
    packed, twin = caches(llama)
    expected = generate(llama, ids, twin, prompt_lookup_num_tokens=3, eos_token_id=1)
    patch_model(llama, 4)
    assert torch.equal(generate(llama, ids, packed, prompt_lookup_num_tokens=3, eos_token_id=1), expected)


def test_untouched_model_outside_the_interface(falcon: Any, prompt: torch.Tensor) -> None:
    packed, twin = caches(falcon)
    before = falcon.config._attn_implementation
    expected = generate(falcon, prompt, twin)
    patch_model(falcon, 4)
    assert falcon.config._attn_implementation == before
    assert torch.equal(generate(falcon, prompt, packed), expected)
    assert {layer.path for layer in packed.summary().layers} == {"intercepted"}


@pytest.mark.parametrize("compress_v", [False, "boundary", lambda index, count: index == 1])
def test_values_in_full_precision(llama: Any, prompt: torch.Tensor, compress_v: Any) -> None:
    packed, twin = caches(llama, compress_v=compress_v)
    expected = generate(llama, prompt, twin)
    patch_model(llama, 4)
    assert torch.equal(generate(llama, prompt, packed), expected)
    kept = [layer.bits[1] is None for layer in packed.summary().layers]
    assert kept == [True, not callable(compress_v)]


def test_paths_are_reported(llama: Any, prompt: torch.Tensor) -> None:
    cache = TurboQuantCache(llama.config)
    generate(llama, prompt, cache)
    assert [layer.path for layer in cache.summary().layers] == ["intercepted"] * 2
    cache = patch_model(llama)
    generate(llama, prompt, cache)
    assert [(layer.path, layer.calls) for layer in cache.summary().layers] == [("fused", NEW_TOKENS - 1)] * 2
    assert "fused" in str(cache.summary())


def test_uncompressed_layers_are_reported(prompt: torch.Tensor) -> None:
    gemma = build(*CONFIGS["gemma2"])
    cache = patch_model(gemma)
    generate(gemma, prompt, cache)
    layers = cache.summary().layers
    assert [layer.path for layer in layers] == ["uncompressed", "fused"]
    assert layers[0].reasons == ("DynamicSlidingWindowLayer",)


def test_memory_figures(llama: Any, prompt: torch.Tensor) -> None:
    cache = TurboQuantCache(llama.config, (4, 3), page_size=16)
    generate(llama, prompt, cache)
    tokens = cache.get_seq_length()
    assert tokens == prompt.shape[1] + NEW_TOKENS - 1
    vectors = 2 * 2 * tokens
    row = 32 * 4 // 8 + 2 + 32 * 3 // 8 + 2
    memory = cache.memory()
    assert memory == CacheMemory(vectors * row, memory.allocated, vectors * 64 * 4, vectors * 64 * 2)
    assert memory.allocated >= memory.stored
    assert memory.bf16_ratio == memory.compression_ratio / 2 == 128 / row
    assert TurboQuantCache(llama.config).memory().bf16_ratio == 1


def test_deepcopy_shares_nothing(llama: Any, prompt: torch.Tensor) -> None:
    cache = TurboQuantCache(llama.config, page_size=16)
    llama(prompt, **{CACHE_ARGUMENT: cache})
    branch = copy.deepcopy(cache)
    continued = torch.cat((prompt, prompt[:, :4]), 1)
    expected = generate(llama, continued, copy.deepcopy(cache))
    generate(llama, continued, branch)
    assert cache.get_seq_length() == prompt.shape[1]
    assert torch.equal(generate(llama, continued, cache), expected)


def test_reset_starts_anew(llama: Any, prompt: torch.Tensor) -> None:
    cache = TurboQuantCache(llama.config)
    expected = generate(llama, prompt, cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(generate(llama, prompt, cache), expected)
    cache.reset()
    assert torch.equal(generate(llama, prompt.repeat(2, 1), cache), expected.repeat(2, 1))


def test_context_manager_gives_a_fresh_cache_each_time(llama: Any, prompt: torch.Tensor) -> None:
    expected = generate(llama, prompt, TurboQuantCache(llama.config, 3))
    plain = generate(llama, prompt, None)
    with turboquant(llama, bits=3):
        assert llama.config._attn_implementation == "turboquant"
        for _ in range(2):
            assert torch.equal(generate(llama, prompt, None), expected)
    assert llama.config._attn_implementation == "sdpa"
    assert torch.equal(generate(llama, prompt, None), plain)


def test_a_pipeline_in_the_block() -> None:
    """It passes no cache, pads its batches itself, and needs nothing but the block."""
    tokenizer = AutoTokenizer.from_pretrained(TINY, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, local_files_only=True).eval()
    options: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False}
    texts = ["The memory of a language model", "A cache of keys"]
    write = pipeline("text-generation", model=model, tokenizer=tokenizer, batch_size=2)
    plain = write(texts, **options)
    with turboquant(model, bits=2):
        written = write(texts, **options)
    assert written != plain
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", return_token_type_ids=False)
    out = model.generate(**inputs, **{CACHE_ARGUMENT: patch_model(model, bits=2)}, **options)
    assert [given["generated_text"] for (given,) in written] == tokenizer.batch_decode(out, skip_special_tokens=True)


def test_patched_model_with_a_stock_cache(model: Any, prompt: torch.Tensor) -> None:
    expected = generate(model, prompt, None)
    before = model.config._attn_implementation
    patch_model(model)
    assert torch.equal(generate(model, prompt, None), expected)
    unpatch_model(model)
    unpatch_model(model)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}, {"prefill_chunk_size": 5}], ids=str)
def test_untouched_model_with_padding(model: Any, padded: dict[str, torch.Tensor], mode: dict[str, Any]) -> None:
    packed, twin = caches(model)
    ids, mask = padded["input_ids"], padded["attention_mask"]
    expected = generate(model, ids, twin, attention_mask=mask, **mode)
    assert torch.equal(generate(model, ids, packed, attention_mask=mask, **mode), expected)
