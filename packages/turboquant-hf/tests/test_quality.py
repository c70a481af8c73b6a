"""Quality per layer, the warnings that it leads to, and centred keys, their cure."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from transformers import BloomConfig, LlamaConfig

from turboquant_core import CacheCodec, PackedSequences, PageLayout, RawLayout, ReferenceProvider, VectorLayout
from turboquant_hf import QualityWarning, TurboQuantCache, patch_model, unpatch_model, verify_model
from turboquant_hf.compat import CACHE_ARGUMENT
from turboquant_hf.quality import exact_attention
from turboquant_hf.verify import decoded_twin

from .conftest import CONFIGS, GQA, VOCABULARY, build


@pytest.fixture
def biased() -> Any:
    """A model whose keys share a large offset, in a pair of channels that rotary embedding hardly turns."""
    model = build(LlamaConfig(**GQA, attention_bias=True), "sdpa")
    for layer in model.model.layers:
        bias = torch.zeros(2, 32)
        bias[:, [15, 31]] = 60.0
        layer.self_attn.k_proj.bias.data.copy_(bias.flatten())
    return model


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_exact_attention_is_what_the_reference_computes(softcap: float | None, with_sinks: bool) -> None:
    layout = PageLayout(VectorLayout(32, 4, "int8"), RawLayout(32, 4), page_size=16, kv_heads=2)
    store = PackedSequences(2, CacheCodec.create(layout), ReferenceProvider(), torch.float32)
    generator = torch.Generator().manual_seed(0)
    store.append(*torch.randn(2, 2, 2, 20, 32, generator=generator))
    query = torch.randn(2, 4, 3, 32, generator=generator)
    options: dict[str, Any] = {
        "scaling": 0.4,
        "seq_starts": torch.tensor([0, 6], dtype=torch.int32),
        "softcap": softcap,
        "sinks": torch.tensor([0.5, -1.0, 2.0, 0.0]) if with_sinks else None,
    }
    decoded = store.past().read(0, 20, torch.float32)
    expected = store.past().attend(query, **options).out
    torch.testing.assert_close(exact_attention(query, decoded, **options), expected, rtol=1e-5, atol=1e-5)


def test_more_bits_are_closer(llama: Any) -> None:
    cosines = []
    patch_model(llama, verify=False)
    for bits in (4, 3, 2):
        layers = verify_model(llama, lambda bits=bits: TurboQuantCache(llama.config, bits)).layers
        assert [layer.layer_idx for layer in layers] == [0, 1]
        cosines.append(min(layer.cosine for layer in layers if layer.cosine is not None))
    assert 1 > cosines[0] > cosines[1] > cosines[2] > 0


def test_layers_that_decode_or_are_not_packed() -> None:
    gemma = build(*CONFIGS["gemma2"])
    layers = verify_model(gemma, lambda: TurboQuantCache(gemma.config)).layers
    # Untouched, and still attention over pages, written out by the model.
    (full,) = layers
    assert full.layer_idx == 1
    assert full.cosine is not None
    assert full.cosine > 0.99
    bloom = build(BloomConfig(vocab_size=VOCABULARY, hidden_size=64, n_layer=2, n_head=2), "eager")
    layers = verify_model(bloom, lambda: TurboQuantCache(bloom.config)).layers
    # Its position bias decodes: no packed attention to measure.
    assert [(layer.layer_idx, layer.cosine) for layer in layers] == [(0, None), (1, None)]


def test_an_offset_of_the_keys_is_a_warning_and_centring_the_cure(biased: Any, llama: Any) -> None:
    with pytest.warns(QualityWarning) as caught:
        plain = patch_model(biased, center_keys=False).verification
    assert "keys share a constant offset in layers 0, 1" in str(caught[0].message)
    assert "center_keys='auto' or True" in str(caught[0].message)
    unpatch_model(biased)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        centred = patch_model(biased).verification
        assert patch_model(llama).verification is not None
    assert plain is not None
    assert centred is not None
    for before, after in zip(plain.layers, centred.layers, strict=True):
        assert (before.cosine or 0) < (after.cosine or 0)
        assert (after.cosine or 0) > 0.97


def test_low_bits_are_a_warning_where_they_hurt(biased: Any) -> None:
    with pytest.warns(QualityWarning) as caught:
        patch_model(biased, 2, center_keys=False)
    assert any("mean cosine" in str(warning.message) for warning in caught)


def test_centred_keys_generate_what_their_decoded_vectors_do(model: Any, prompt: torch.Tensor) -> None:
    packed = TurboQuantCache(model.config, 3, center_keys=True)
    twin = decoded_twin(TurboQuantCache(model.config, 3, center_keys=True), model.config)
    options = {"attention_mask": torch.ones_like(prompt), "pad_token_id": 0, "max_new_tokens": 8, "do_sample": False}
    expected = model.generate(prompt, **{CACHE_ARGUMENT: twin}, **options)
    patch_model(model, verify=False)
    assert torch.equal(model.generate(prompt, **{CACHE_ARGUMENT: packed}, **options), expected)
    # A soft cap does not forget a constant that all scores of a query lose.
    path = "decoded" if model.config.model_type == "gemma2" else "fused"
    assert packed.summary().layers[1].path == path


def test_the_centre_is_counted(llama: Any, prompt: torch.Tensor) -> None:
    caches = [TurboQuantCache(llama.config, center_keys=center) for center in (False, True)]
    for cache in caches:
        llama(prompt, **{CACHE_ARGUMENT: cache})
    plain, centred = (cache.memory() for cache in caches)
    assert centred.stored - plain.stored == 2 * 2 * 32 * 4
