"""Bad options and unsuitable models: one clear error each, before anything is packed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, MistralConfig

from turboquant_core import LayoutError, ProviderError, Windows
from turboquant_hf import TurboQuantCache, patch_model
from turboquant_hf.compat import CACHE_ARGUMENT

from .conftest import CONFIGS, GQA, build


@pytest.mark.parametrize("bits", [0, 1, 5, 4.25, True, (4,), (4, 5), "4"])
def test_bits(llama: Any, bits: Any) -> None:
    with pytest.raises(ValueError, match="bits is"):
        patch_model(llama, bits)
    assert llama.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    "options",
    [
        {"compress_v": "first"},
        {"page_size": 0},
        {"page_size": 20},
        {"page_size": 64.0},
        {"seed": -1},
        {"seed": 2**64},
        {"seed": 1.0},
        {"seed": True},
    ],
)
def test_other_options(llama: Any, options: dict[str, Any]) -> None:
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name} is {value!r}"):
        TurboQuantCache(llama.config, **options)


def test_bits_of_a_layer_are_named_with_it(llama: Any) -> None:
    with pytest.raises(LayoutError, match=r"bits is 5 for layer 1; the packed layout has \(2, 2\.5, 3, 3\.5, 4\)"):
        TurboQuantCache(llama.config, bits={0: 4, 1: (4, 5)})
    with pytest.raises(LayoutError, match=r"bits is \(4, 3, 2\) for layer 0; give one number"):
        TurboQuantCache(llama.config, bits={0: (4, 3, 2)})


def test_lists_and_numbers_of_numpy_are_bits(llama: Any) -> None:
    cache = TurboQuantCache(llama.config, bits=[np.int64(4), 2.5], seed=np.int64(7))  # type: ignore[arg-type]
    assert cache.options.layer_bits(0) == (4, 2.5)
    assert type(cache.options.seed) is int


def test_unknown_provider(llama: Any, prompt: torch.Tensor) -> None:
    with pytest.raises(ProviderError, match="nowhere"):
        llama(prompt, **{CACHE_ARGUMENT: TurboQuantCache(llama.config, provider="nowhere")})


def test_head_dim_that_cannot_be_packed(prompt: torch.Tensor) -> None:
    model = build(LlamaConfig(**{**GQA, "head_dim": 20}), "sdpa")
    with pytest.raises(LayoutError, match=r"layer 0 cannot be packed: head_dim is 20; .*here 16 or 24: .*DynamicCache"):
        patch_model(model)


def test_model_without_full_attention() -> None:
    with pytest.raises(ValueError, match="DynamicSlidingWindowLayer"):
        TurboQuantCache(MistralConfig(**GQA, sliding_window=8))


def test_assignment_is_refused(llama: Any, prompt: torch.Tensor) -> None:
    cache = TurboQuantCache(llama.config)
    llama(prompt, **{CACHE_ARGUMENT: cache})
    with pytest.raises(TypeError, match="layer 0"):
        cache.layers[0].keys = prompt


def test_public_names() -> None:
    import turboquant_hf

    assert turboquant_hf.__all__ == sorted(turboquant_hf.__all__, key=lambda name: (name.islower(), name))
    assert all(hasattr(turboquant_hf, name) for name in turboquant_hf.__all__)


@pytest.mark.default_window
@pytest.mark.parametrize("kind", ["growing", "static"])
def test_defaults(llama: Any, kind: str) -> None:
    room = {"max_cache_len": 64} if kind == "static" else {}
    cache = patch_model(llama, **room)
    assert cache.options.windows == Windows(sink_tokens=0, recent_tokens=16)
    assert cache.options.center_keys == "auto"
    llama(torch.ones(1, 40, dtype=torch.int64), **{CACHE_ARGUMENT: cache})
    if kind == "growing":
        store = cache.layers[0].packed_sequences
        assert (store.packed.length, store.recent.keys.shape[2]) == (24, 16)


def test_keys_whose_scores_see_a_centre_are_not_centred() -> None:
    config = CONFIGS["gemma2"][0]
    assert TurboQuantCache(config).options.center_keys is False
    assert TurboQuantCache(config, center_keys=True).options.center_keys is True


def test_an_offset_is_centred_without_being_asked(llama: Any) -> None:
    # The slowest rotary channels of both heads, which positions leave almost where they are.
    offset = torch.zeros(64)
    offset[[14, 15, 30, 31, 46, 47, 62, 63]] = 60.0
    ids = torch.randint(2, 90, (1, 40), generator=torch.Generator().manual_seed(0))
    hook = llama.model.layers[0].self_attn.k_proj.register_forward_hook(lambda module, args, out: out + offset)
    cache = TurboQuantCache(llama.config)
    llama(ids, **{CACHE_ARGUMENT: cache})
    hook.remove()
    centers = cache.key_centers()
    assert 1 not in centers
    assert centers[0].shape == (2, 32)
