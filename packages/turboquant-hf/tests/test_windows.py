"""Options that keep some tokens exact, pack by layer, or pack sliding windows: as the twin that knows no attention."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from transformers import DynamicCache, MistralConfig

from turboquant_hf import TurboQuantCache, patch_model, verify_model
from turboquant_hf.check_steps import run_steps
from turboquant_hf.compat import CACHE_ARGUMENT
from turboquant_hf.sliding_layer import TurboQuantSlidingLayer
from turboquant_hf.verify import decoded_twin

from .conftest import CONFIGS, GQA, build

SLIDING = {"compress_sliding": True}


def sliding_model(window: int = 8) -> Any:
    return build(MistralConfig(**GQA, sliding_window=window), "sdpa")


@pytest.mark.parametrize(
    "options",
    [
        {"sink_tokens": 3},
        {"recent_tokens": 6},
        {"sink_tokens": 4, "recent_tokens": 5, "center_keys": True},
        {"start_after": 26, "recent_tokens": 2},
        {"start_after": 1000},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_wiring(name: str, options: dict[str, Any]) -> None:
    """Left padding, single steps and a step of three over the past; gemma2 adds a soft cap and sliding layers."""
    model = build(*CONFIGS[name])
    patch_model(model, verify=False)
    verification = verify_model(model, lambda: TurboQuantCache(model.config, 2, page_size=16, **SLIDING, **options))
    assert verification.error < 1e-3


@pytest.mark.parametrize("window", [5, 8, 20, 40])
@pytest.mark.parametrize("options", [{}, {"recent_tokens": 3}, {"start_after": 12}], ids=str)
def test_sliding_layers(window: int, options: dict[str, Any]) -> None:
    """Across the window: the prompt has 24 tokens, the past of a step of three up to 31."""
    model = sliding_model(window)
    patch_model(model, verify=False, **SLIDING)
    verify_model(model, lambda: TurboQuantCache(model.config, page_size=16, **SLIDING, **options))


def test_a_sliding_layer_keeps_its_window_and_little_more() -> None:
    model = sliding_model(20)
    cache = TurboQuantCache(model.config, page_size=16, **SLIDING)
    twin = decoded_twin(TurboQuantCache(model.config, page_size=16, **SLIDING), model.config)
    ids = torch.randint(2, 97, (1, 90), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for chunk in (ids[:, :30], ids[:, 30:70], *ids[:, 70:].split(1, 1)):
            got, expected = (model(chunk, **{CACHE_ARGUMENT: c}).logits for c in (cache, twin))
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    layer = cache.layers[0]
    assert isinstance(layer, TurboQuantSlidingLayer)
    assert layer.packed_sequences.length < 20 + 16
    assert cache.get_seq_length() == twin.get_seq_length() == 90
    assert cache.get_mask_sizes(2, 0) == twin.get_mask_sizes(2, 0)
    with pytest.raises(RuntimeError, match="layer 0 cannot go back 80 tokens"):
        cache.crop(-80)


@pytest.mark.skipif(
    not hasattr(DynamicCache, "activate_past_recording"), reason="sliding layers record their past since 5.14"
)
def test_a_sliding_layer_that_records_its_past_can_be_cropped() -> None:
    model = sliding_model(8)
    caches = [TurboQuantCache(model.config, page_size=16, **SLIDING)]
    caches.append(decoded_twin(TurboQuantCache(model.config, page_size=16, **SLIDING), model.config))
    ids = torch.randint(2, 97, (1, 40), generator=torch.Generator().manual_seed(0))
    for cache in caches:
        for layer in cache.layers:
            layer.record_past = True
        with torch.no_grad():
            model(ids[:, :30], **{CACHE_ARGUMENT: cache})
            model(ids[:, 30:33], **{CACHE_ARGUMENT: cache})
        cache.crop(-2)
    with torch.no_grad():
        got, expected = (model(ids[:, 31:34], **{CACHE_ARGUMENT: cache}).logits for cache in caches)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_sinks_follow_the_padding_of_each_row(llama: Any) -> None:
    patch_model(llama, verify=False)
    cache = TurboQuantCache(llama.config, 2, sink_tokens=3)
    run_steps(llama, cache)
    assert cache.layers[0].packed_sequences.sinks.starts.tolist() == [0, 5]


def test_an_untouched_model_is_told_or_warns(llama: Any) -> None:
    with pytest.warns(UserWarning, match="call note_padding"):
        run_steps(llama, TurboQuantCache(llama.config, sink_tokens=3))
    told = TurboQuantCache(llama.config, sink_tokens=3)
    told.note_padding(torch.tensor([[1] * 24, [0] * 5 + [1] * 19]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run_steps(llama, told)
    assert told.layers[0].packed_sequences.sinks.starts.tolist() == [0, 5]
    with pytest.raises(ValueError, match=r"attention_mask has shape \(3,\)"):
        told.note_padding(torch.ones(3))


def test_before_start_after_a_layer_is_a_stock_layer(llama: Any, prompt: torch.Tensor) -> None:
    packed, stock = TurboQuantCache(llama.config, start_after=30), DynamicCache(config=llama.config)
    with torch.no_grad():
        for ids in (prompt, prompt[:, :4], prompt[:, :1]):
            got, expected = (llama(ids, **{CACHE_ARGUMENT: cache}).logits for cache in (packed, stock))
            assert torch.equal(got, expected)
        assert packed.layers[0].counters.path == "unused"
        llama(prompt, **{CACHE_ARGUMENT: packed})
        llama(prompt[:, :1], **{CACHE_ARGUMENT: packed})
    assert packed.layers[0].counters.path != "unused"


@pytest.mark.parametrize("bits", [{0: 4, 1: (3, 2)}, lambda index: (4, (3, 2))[index]])
def test_bits_by_layer(llama: Any, prompt: torch.Tensor, bits: Any) -> None:
    cache = TurboQuantCache(llama.config, bits)
    llama(prompt, **{CACHE_ARGUMENT: cache})
    assert [layer.bits for layer in cache.summary().layers] == [(4, 4), (3, 2)]
    layouts = [layer.packed_sequences.layout for layer in cache.layers]
    assert [(layout.key.bits, layout.value.bits) for layout in layouts] == [(4, 4), (3, 2)]


@pytest.mark.parametrize("bits", [{0: 4}, {0: 4, 1: 9}, lambda index: 4 + index])
def test_bad_bits_by_layer_name_the_layer_or_the_bits(llama: Any, bits: Any) -> None:
    with pytest.raises(ValueError, match=r"no entry for layer 1|bits is 9|bits is 5"):
        TurboQuantCache(llama.config, bits)


@pytest.mark.parametrize("form", [dict, list, torch.stack])
def test_fixed_centres(llama: Any, prompt: torch.Tensor, form: Any) -> None:
    means = TurboQuantCache(llama.config, center_keys=True)
    llama(prompt, **{CACHE_ARGUMENT: means})
    centers = means.key_centers()
    given = centers if form is dict else form(list(centers.values()))
    fixed = TurboQuantCache(llama.config, center_keys=given)
    for cache in (means, fixed):
        cache.crop(0)
    llama(prompt, **{CACHE_ARGUMENT: fixed})
    assert torch.equal(*(c.layers[1].packed_sequences.past().packed.pages for c in (means, fixed)))


@pytest.mark.parametrize("given", ["yes", [torch.zeros(2, 32)], {0: torch.zeros(3, 32)}])
def test_bad_centres(llama: Any, prompt: torch.Tensor, given: Any) -> None:
    with pytest.raises(
        ValueError, match=r"center_keys is 'yes'|none for layer 1|layer 0 cannot be packed: center has 3"
    ):
        llama(prompt, **{CACHE_ARGUMENT: TurboQuantCache(llama.config, center_keys=given)})


def test_windows_count_in_memory(llama: Any, prompt: torch.Tensor) -> None:
    plain, windowed = TurboQuantCache(llama.config), TurboQuantCache(llama.config, sink_tokens=2, recent_tokens=8)
    for cache in (plain, windowed):
        llama(prompt, **{CACHE_ARGUMENT: cache})
    token = 2 * 2 * 2 * 32 * 4
    packed_token = plain.memory().stored // 21
    assert windowed.memory().stored == 13 * packed_token + (2 + 8) * token
    assert windowed.memory().uncompressed == plain.memory().uncompressed


def test_offloading_moves_pages_and_brings_them_back(llama: Any, prompt: torch.Tensor) -> None:
    cache, other = (TurboQuantCache(llama.config, recent_tokens=4) for _ in range(2))
    with torch.no_grad():
        llama(prompt, **{CACHE_ARGUMENT: cache})
        llama(prompt, **{CACHE_ARGUMENT: other})
        for layer in cache.layers:
            layer.offload()
            assert layer.packed_sequences.device.type == "cpu"
        got, expected = (llama(prompt[:, :2], **{CACHE_ARGUMENT: c}).logits for c in (cache, other))
    assert torch.equal(got, expected)
    moved = copy.deepcopy(cache.layers[0])
    moved.packed_sequences.move("meta")
    moved.device = torch.device("meta")
    moved.prefetch()
    assert moved.packed_sequences.device.type == "meta"


@pytest.mark.parametrize("name", ["sink_tokens", "recent_tokens", "start_after"])
def test_bad_windows(llama: Any, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is -1; it must be a number of tokens"):
        TurboQuantCache(llama.config, **{name: -1})
