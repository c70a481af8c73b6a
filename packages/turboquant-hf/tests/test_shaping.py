"""Shaped codes of prompts: what is measured on a model, and what is written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from turboquant_core import TurboQuantError
from turboquant_core.shaping import output_moment, query_moment
from turboquant_hf import Shaping, TurboQuantCache, measure_shaping, patch_model, unpatch_model
from turboquant_hf import shaping as shaping_module
from turboquant_hf.compat import CACHE_ARGUMENT
from turboquant_hf.shaping import SHAPED_TOKENS

from .conftest import CONFIGS, VOCABULARY, build

TOKENS = 48


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(2, VOCABULARY, (2, TOKENS), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def fill(model: Any, cache: Any, *calls: Tensor) -> None:
    for call in calls:
        model(call, **{CACHE_ARGUMENT: cache})


def pages_of(cache: TurboQuantCache) -> list[Tensor]:
    return [layer.packed_sequences.packed.export() for layer in cache.layers]


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3", "gpt2"])
def test_weights_are_those_of_queries_and_output_projections(name: str, ids: Tensor) -> None:
    model = build(*CONFIGS[name])
    seen: list[Tensor] = []
    stock = torch.nn.functional.scaled_dot_product_attention

    def spy(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(query)
        return stock(query, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
        model(ids)
    shaping = measure_shaping(model, ids)
    assert sorted(shaping.keys) == sorted(shaping.values) == [0, 1]
    heads, dim = shaping.keys[0].shape[:2]
    for index, query in enumerate(seen):
        torch.testing.assert_close(shaping.keys[index], query_moment(query, heads))
    modules = dict(model.named_modules())
    projection = next(m for n, m in modules.items() if ".0." in n and n.endswith(("attn.o_proj", "attn.c_proj")))
    weight = projection.weight.T if name == "gpt2" else projection.weight
    torch.testing.assert_close(shaping.values[0], output_moment(weight, heads, dim))


def test_a_prompt_is_shaped_and_single_tokens_are_not(llama: Any, ids: Tensor) -> None:
    shaping = measure_shaping(llama, ids)
    plain, shaped = TurboQuantCache(llama.config, 3), TurboQuantCache(llama.config, 3, shaped=shaping)
    for cache in (plain, shaped):
        fill(llama, cache, ids[:, :SHAPED_TOKENS])
    assert all(not torch.equal(a, b) for a, b in zip(pages_of(plain), pages_of(shaped), strict=True))
    short, same = TurboQuantCache(llama.config, 3), TurboQuantCache(llama.config, 3, shaped=shaping)
    for cache in (short, same):
        fill(llama, cache, ids[:, : SHAPED_TOKENS - 1], ids[:, SHAPED_TOKENS - 1 : SHAPED_TOKENS])
    assert all(torch.equal(a, b) for a, b in zip(pages_of(short), pages_of(same), strict=True))


def test_the_weighted_error_falls(llama: Any, ids: Tensor) -> None:
    shaping = measure_shaping(llama, ids)
    errors = []
    for cache in (TurboQuantCache(llama.config, 2), TurboQuantCache(llama.config, 2, shaped=shaping)):
        exact: dict[int, tuple[Tensor, Tensor]] = {}
        update = cache.layers[0].update

        def see(key: Tensor, value: Tensor, *args: Any, update: Any = update, exact: Any = exact, **kwargs: Any) -> Any:
            exact[0] = key, value
            return update(key, value, *args, **kwargs)

        vars(cache.layers[0])["update"] = see
        fill(llama, cache, ids)
        read = cache.layers[0].past().read(0, TOKENS, torch.float32)
        pairs = zip(read, exact[0], (shaping.keys[0], shaping.values[0]), strict=True)
        errors.append([float(torch.einsum("bhtd,hde,bhte->", got - x, w, got - x)) for got, x, w in pairs])
    (keys, values), (shaped_keys, shaped_values) = errors
    assert shaped_keys < 0.9 * keys
    assert shaped_values < 0.9 * values


def test_patch_model_measures(llama: Any, ids: Tensor) -> None:
    cache = patch_model(llama, 3, shaped=True, calibration=ids)
    assert cache.verification is not None
    assert isinstance(cache.options.shaped, Shaping)
    plain = patch_model(llama, 3)
    for one in (plain, cache):
        fill(llama, one, ids, ids[:, :1], ids[:, :3])
    assert not torch.equal(pages_of(plain)[0], pages_of(cache)[0])
    unpatch_model(llama)


def test_a_shaped_cache_does_what_others_do(llama: Any, ids: Tensor, tmp_path: Any) -> None:
    cache = patch_model(llama, 4, shaped=True, calibration=ids, recent_tokens=4)
    out = llama.generate(ids, **{CACHE_ARGUMENT: cache}, max_new_tokens=5, do_sample=False)
    assert out.shape == (2, TOKENS + 5)
    cache.save(tmp_path / "shaped.safetensors")
    again = TurboQuantCache(llama.config, 4, recent_tokens=4)
    again.load(tmp_path / "shaped.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(pages_of(cache), pages_of(again), strict=True))
    cache.batch_select_indices(torch.tensor([1]))
    cache.crop(-2)
    fill(llama, cache, ids[:1, :2])
    assert cache.get_seq_length() == TOKENS + 4


def test_what_cannot_be_shaped_is_refused(llama: Any, ids: Tensor) -> None:
    with pytest.raises(ValueError, match="shaped is True; a cache takes what measure_shaping"):
        TurboQuantCache(llama.config, shaped=True)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="leave max_cache_len out"):
        patch_model(llama, max_cache_len=64, shaped=True, calibration=ids)
    shaping = measure_shaping(llama, ids)
    cache = TurboQuantCache(llama.config, shaped=Shaping({0: shaping.keys[0]}, {0: shaping.values[0]}))
    with pytest.raises(ValueError, match=r"no weights for layer 1; it has \[0\]"):
        fill(llama, cache, ids)


def test_models_that_show_no_queries_or_projection_are_refused(ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TurboQuantError, match="attn_implementation='sdpa'"):
        measure_shaping(build(*CONFIGS["llama-eager"]), ids)
    monkeypatch.setattr(shaping_module, "PROJECTIONS", ("output",))
    with pytest.raises(TurboQuantError, match=r"layer 0 .* no output projection of 128 inputs .*\(looked for output\)"):
        measure_shaping(build(*CONFIGS["llama"]), ids)
