"""Operations on the cache between steps act on packed bytes as the stock cache acts on tensors."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from transformers import DynamicCache, Gemma3TextConfig, Lfm2Config

from turboquant_hf import TurboQuantCache
from turboquant_hf.compat import CACHE_ARGUMENT
from turboquant_hf.verify import decoded_twin

from .conftest import GQA, build


@pytest.fixture
def pair(llama: Any) -> tuple[TurboQuantCache, Any]:
    """A packed cache and its decoded twin, with three sequences of 21 tokens each."""
    ids = torch.randint(2, 97, (3, 21), generator=torch.Generator().manual_seed(1))
    packed = TurboQuantCache(llama.config, (4, 3), page_size=16)
    twin = decoded_twin(TurboQuantCache(llama.config, (4, 3), page_size=16), llama.config)
    for cache in (packed, twin):
        llama(ids, **{CACHE_ARGUMENT: cache})
    return packed, twin


def step(model: Any, cache: Any, batch: int) -> torch.Tensor:
    """Logits of two tokens over what the cache holds; the sequences get different tokens."""
    ids = torch.arange(2, 2 + 2 * batch).view(batch, 2)
    return model(ids, **{CACHE_ARGUMENT: cache}).logits


@pytest.mark.parametrize(
    ("operation", "batch", "length"),
    [
        (lambda cache: cache.crop(-4), 3, 17),
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), 3, 21),
        (lambda cache: cache.batch_repeat_interleave(2), 6, 21),
        (lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), 2, 21),
        (lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])), 2, 21),
    ],
    ids=["crop", "reorder", "repeat", "select", "select-mask"],
)
def test_as_the_stock_cache(
    llama: Any, pair: tuple[TurboQuantCache, Any], operation: Any, batch: int, length: int
) -> None:
    packed, twin = pair
    for cache in pair:
        operation(cache)
    assert packed.get_seq_length() == twin.get_seq_length() == length
    assert packed.get_mask_sizes(2, 0) == twin.get_mask_sizes(2, 0)
    for _ in range(2):
        torch.testing.assert_close(step(llama, packed, batch), step(llama, twin, batch), rtol=1e-4, atol=1e-4)


def test_crop_of_nothing_and_of_more_than_there_is(pair: tuple[TurboQuantCache, Any]) -> None:
    packed, _ = pair
    packed.layers[0].crop(0)
    assert packed.get_seq_length() == 21
    packed.crop(-100)
    assert packed.get_seq_length() == 0


def test_the_first_tokens_after_an_empty_crop_are_raw(llama: Any, pair: tuple[TurboQuantCache, Any]) -> None:
    packed, _ = pair
    packed.crop(-21)
    fresh = TurboQuantCache(llama.config, (4, 3))
    assert torch.equal(step(llama, packed, 3), step(llama, fresh, 3))


def test_a_copy_shares_provider_and_codec_but_no_page(pair: tuple[TurboQuantCache, Any]) -> None:
    packed, _ = pair
    old, new = packed.layers[0].packed_sequences, copy.deepcopy(packed).layers[0].packed_sequences
    assert new.provider is old.provider
    assert new.codec is old.codec
    assert new.past().packed.pages.data_ptr() != old.past().packed.pages.data_ptr()
    assert torch.equal(new.past().packed.pages, old.past().packed.pages)


def test_save_and_load(llama: Any, pair: tuple[TurboQuantCache, Any]) -> None:
    packed, _ = pair
    file = io.BytesIO()
    torch.save(packed, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(step(llama, loaded, 3), step(llama, packed, 3))


def test_another_number_of_sequences_is_another_prompt(llama: Any, pair: tuple[TurboQuantCache, Any]) -> None:
    packed, _ = pair
    with pytest.raises(ValueError, match=r"layer 0 holds 3 sequences and got 1.*start a new cache"):
        step(llama, packed, 1)
    packed.reset()
    step(llama, packed, 1)


def test_pages_grow_without_a_copy_of_every_step(llama: Any, pair: tuple[TurboQuantCache, Any]) -> None:
    packed, _ = pair
    pages = {packed.layers[0].packed_sequences.past().packed.pages.data_ptr()}
    for _ in range(5):
        step(llama, packed, 3)
        pages.add(packed.layers[0].packed_sequences.past().packed.pages.data_ptr())
    assert packed.get_seq_length() == 31
    assert len(pages) == 1


ATTENTION_FIRST: dict[str, Any] = {
    "linear": Lfm2Config(**GQA, conv_L_cache=3, layer_types=["full_attention", "conv"]),
    "sliding": Gemma3TextConfig(**GQA, sliding_window=8, layer_types=["full_attention", "sliding_attention"]),
}
"""A layer that has refused nothing yet when the next one refuses."""


@pytest.mark.parametrize(
    ("name", "operation", "error"),
    [
        ("linear", lambda cache: cache.crop(-4), RuntimeError),
        ("linear", lambda cache: cache.batch_repeat_interleave(2), ValueError),
        ("linear", lambda cache: cache.batch_select_indices(torch.tensor([0])), ValueError),
        ("sliding", lambda cache: cache.crop(-4), RuntimeError),
    ],
    ids=["linear-crop", "linear-repeat", "linear-select", "sliding-crop"],
)
@pytest.mark.skipif(not hasattr(DynamicCache, "is_croppable"), reason="Transformers 5.5 lets these layers be")
def test_what_one_layer_refuses_changes_no_layer(name: str, operation: Any, error: type[Exception]) -> None:
    model = build(ATTENTION_FIRST[name], "sdpa")
    ids = torch.randint(2, 97, (3, 21), generator=torch.Generator().manual_seed(1))
    cache, untouched = (TurboQuantCache(model.config, page_size=16) for _ in range(2))
    with torch.no_grad():
        for one in (cache, untouched):
            model(ids, **{CACHE_ARGUMENT: one})
        with pytest.raises(error):
            operation(cache)
        assert torch.equal(step(model, cache, 3), step(model, untouched, 3))
