"""Operations on the cache of an encoder-decoder reach its packed self-attention and its stock cross-attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache

from turboquant_core import TurboQuantError
from turboquant_hf import TurboQuantCache, attention, check_model_compatibility, patch_model
from turboquant_hf.compat import CACHE_ARGUMENT, RESET_KEEPS_LENGTH

from .conftest import VOCABULARY
from .sweep.identity import identity_provider
from .test_modes import seq2seq

OPERATIONS: dict[str, tuple[Any, Any]] = {
    "crop": (lambda cache: cache.crop(-4), [0, 1]),
    "repeat": (lambda cache: cache.batch_repeat_interleave(3), [0, 0, 0, 1, 1, 1]),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([1, 1])), [1, 1]),
    "reset": (lambda cache: cache.reset(), [0, 1]),
}


@torch.no_grad()
def step(model: Any, encoded: Any, cache: Any, tokens: int) -> torch.Tensor:
    batch = encoded.last_hidden_state.shape[0]
    ids = torch.randint(2, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(tokens))
    return model(encoder_outputs=encoded, decoder_input_ids=ids, use_cache=True, **{CACHE_ARGUMENT: cache}).logits


@pytest.mark.parametrize("windows", [{}, {"recent_tokens": 3}], ids=["plain", "recent"])
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
def test_as_the_stock_cache(name: str, operation: str, windows: dict[str, int]) -> None:
    model, inputs = seq2seq(name)
    change, rows = OPERATIONS[operation]
    if operation == "reset" and RESET_KEEPS_LENGTH:
        pytest.skip("the stock cross-attention is not emptied before Transformers 5.18")
    patch_model(model, verify=False, **windows)
    with torch.no_grad():
        encoded = model.get_encoder()(**inputs)
    with identity_provider() as provider:
        packed = TurboQuantCache(model.config, page_size=16, provider=provider, **windows)
        caches = [EncoderDecoderCache(cache, DynamicCache()) for cache in (packed, DynamicCache())]
        for cache in caches:
            step(model, encoded, cache, 18)
            step(model, encoded, cache, 2)
            change(cache)
        encoded.last_hidden_state = encoded.last_hidden_state[rows]
        for tokens in (3, 1, 1):
            got, expected = (step(model, encoded, cache, tokens) for cache in caches)
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
        assert caches[0].get_seq_length() == caches[1].get_seq_length()


@pytest.mark.parametrize("room", [None, 64], ids=["growing", "static"])
@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
def test_patch_model_verifies_the_decoder(name: str, room: int | None) -> None:
    model, inputs = seq2seq(name)
    cache = patch_model(model, max_cache_len=room, sink_tokens=2, recent_tokens=4)
    assert cache.verification is not None
    assert cache.verification.error <= cache.verification.tolerance
    assert len(cache.verification.layers) == len(cache.layers)
    out = model.generate(**inputs, **{CACHE_ARGUMENT: cache}, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert getattr(out, "sequences", out).shape[1] >= 8
    assert {layer.path for layer in cache.summary().layers} == {"decoded" if name == "t5" else "fused"}


def test_a_wrong_mask_of_the_decoder_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = seq2seq("bart")

    def shifted(*arguments: Any, **options: Any) -> torch.Tensor:
        return fused_attention(*arguments, **options).roll(1, 0)

    fused_attention = attention.fused_attention
    monkeypatch.setattr(attention, "fused_attention", shifted)
    with pytest.raises(TurboQuantError, match="gives other logits over packed pages"):
        patch_model(model)
    assert "prepare_inputs_for_generation" not in vars(model)


@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
def test_its_layers_are_reported(name: str) -> None:
    model, _ = seq2seq(name)
    report = check_model_compatibility(model)
    assert report["eligible_layers"] == model.config.get_text_config(decoder=True).num_hidden_layers == 2
    # T5 adds a bias by distance to every score.
    assert report["compatible"] == (name != "t5")
