"""Layers with a state beside keys and values: what is done to the cache is done to both, as in the stock cache."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from turboquant_hf import CacheFileError, TurboQuantCache, check_model_compatibility, patch_model

from .special_models import (
    BATCH,
    CONVOLVED,
    INDEXED,
    LENGTH,
    RECURRENT,
    assert_nothing_is_left_after_a_reset,
    assert_same_steps,
    known,
    special_model,
    step,
)
from .sweep.identity import identity_provider


@pytest.fixture
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[Any, TurboQuantCache, Any]]:
    """A model, a packed cache that loses nothing, and the stock cache, both with a prompt."""
    model = special_model(request.param)
    with identity_provider() as provider:
        packed = TurboQuantCache(model.config, page_size=16, provider=provider, compress_sliding=True)
        pair = packed, DynamicCache(config=model.config)
        for cache in pair:
            step(model, cache, BATCH, LENGTH)
        yield model, *pair


OPERATIONS: dict[str, tuple[Callable[[Any, Any], Any], int]] = {
    "nothing": (lambda model, cache: None, BATCH),
    "reorder": (lambda model, cache: cache.reorder_cache(torch.tensor([2, 0, 0])), BATCH),
    "offload": (lambda model, cache: [layer.offload() for layer in cache.layers], BATCH),
}
OF_INDEXED: dict[str, tuple[Callable[[Any, Any], Any], int]] = {
    "crop": (lambda model, cache: cache.crop(-5), BATCH),
    "crop nothing": (lambda model, cache: cache.crop(0), BATCH),
    "repeat": (lambda model, cache: cache.batch_repeat_interleave(2), 2 * BATCH),
    "select": (lambda model, cache: cache.batch_select_indices(torch.tensor([2, 0])), 2),
    "select mask": (lambda model, cache: cache.batch_select_indices(torch.tensor([True, False, True])), 2),
}


@pytest.mark.parametrize("pair", [known(RECURRENT), known(INDEXED), known(CONVOLVED)], indirect=True)
@pytest.mark.parametrize("name", OPERATIONS)
def test_as_the_stock_cache(pair: tuple[Any, Any, Any], name: str) -> None:
    operation, batch = OPERATIONS[name]
    model, *caches = pair
    for cache in caches:
        operation(model, cache)
    assert_same_steps(model, *caches, batch=batch)


@pytest.mark.parametrize("pair", [known(RECURRENT), known(INDEXED), known(CONVOLVED)], indirect=True)
def test_nothing_is_left_after_a_reset(pair: tuple[Any, Any, Any]) -> None:
    model, packed, _ = pair
    assert_nothing_is_left_after_a_reset(model, packed)


@pytest.mark.parametrize("pair", [known(INDEXED)], indirect=True)
@pytest.mark.parametrize("name", OF_INDEXED)
def test_keys_of_an_indexer_follow(pair: tuple[Any, Any, Any], name: str) -> None:
    operation, batch = OF_INDEXED[name]
    model, *caches = pair
    for cache in caches:
        operation(model, cache)
    assert_same_steps(model, *caches, batch=batch)


@pytest.mark.parametrize("pair", [known(INDEXED)], indirect=True)
def test_positions_that_a_model_assigns_are_the_indexers(pair: tuple[Any, Any, Any]) -> None:
    _, packed, _ = pair
    packed.layers[0].indexer_position_ids = torch.arange(LENGTH).expand(1, BATCH, LENGTH)
    packed.crop(-5)
    assert packed.layers[0].indexer_position_ids.shape[-1] == LENGTH - 5


@pytest.mark.parametrize("pair", [known(CONVOLVED)], indirect=True)
def test_a_convolution_that_records_its_past_can_be_cropped(pair: tuple[Any, Any, Any]) -> None:
    model, *caches = pair
    for cache in caches:
        cache.reset()
        cache.activate_past_recording()
        step(model, cache, BATCH, LENGTH)
        step(model, cache, BATCH, 3)
        assert cache.is_croppable
        cache.crop(-2)
    assert_same_steps(model, *caches)


@pytest.mark.parametrize("pair", [known(RECURRENT)], indirect=True)
@pytest.mark.parametrize(
    ("operation", "message"),
    [
        (lambda cache: cache.batch_repeat_interleave(2), "layer 0 keeps a LinearAttentionLayer, which.*reorder_cache"),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), "which has no batch_select_indices"),
    ],
    ids=["repeat", "select"],
)
def test_what_a_recurrent_state_cannot_do_changes_nothing(
    pair: tuple[Any, Any, Any], operation: Any, message: str
) -> None:
    model, packed, stock = pair
    with pytest.raises(ValueError, match=message):
        operation(packed)
    assert_same_steps(model, packed, stock)


@pytest.mark.skipif(not hasattr(DynamicCache, "is_croppable"), reason="Transformers 5.5 lets a recurrent state be")
@pytest.mark.parametrize("pair", [known(RECURRENT)], indirect=True)
def test_a_recurrent_state_cannot_go_back(pair: tuple[Any, Any, Any]) -> None:
    model, packed, stock = pair
    assert not packed.is_croppable
    with pytest.raises(RuntimeError, match="does not track past states"):
        packed.crop(-2)
    assert_same_steps(model, packed, stock)


@pytest.mark.parametrize("pair", [known(RECURRENT), known(INDEXED), known(CONVOLVED)], indirect=True)
def test_a_copy_has_a_state_of_its_own(pair: tuple[Any, Any, Any]) -> None:
    model, packed, stock = pair
    copied = copy.deepcopy(packed)
    step(model, packed, BATCH, 4)
    assert_same_steps(model, copied, stock)


@pytest.mark.parametrize("name", [known(RECURRENT), known(INDEXED), known(CONVOLVED)])
def test_states_count_in_memory(name: str) -> None:
    model = special_model(name)
    packed, stock = TurboQuantCache(model.config, recent_tokens=0, page_size=16), DynamicCache(config=model.config)
    for cache in (packed, stock):
        step(model, cache, 1, LENGTH)
    layer, twin = packed.layers[-1], stock.layers[-1]
    beside = sum(x.nbytes for x in states(twin))
    assert beside > 0
    assert layer.memory().stored == layer.store.memory().stored + beside
    assert layer.memory().uncompressed == twin.keys.nbytes + twin.values.nbytes + beside


def states(layer: Any) -> list[torch.Tensor]:
    names = ("indexer_keys", "conv_states", "recurrent_states")
    found = [getattr(layer, name, None) for name in names]
    parts = [part for value in found for part in (value.values() if isinstance(value, dict) else [value])]
    return [part for part in parts if part is not None]


@pytest.mark.parametrize("name", [known(RECURRENT), known(INDEXED), known(CONVOLVED)])
def test_is_verified(name: str) -> None:
    """Pages against a stock cache of the decoded vectors, which has the state as well."""
    model = copy.deepcopy(special_model(name))
    cache = patch_model(model, page_size=16, recent_tokens=0, compress_sliding=True)
    assert cache.verification.error < 1e-3
    report = check_model_compatibility(model)
    assert report["eligible_layers"] > 0


@pytest.mark.parametrize("pair", [known(RECURRENT), known(INDEXED)], indirect=True)
def test_is_not_saved_without_its_state(pair: tuple[Any, Any, Any], tmp_path: Path) -> None:
    _, packed, _ = pair
    with pytest.raises(CacheFileError, match=r"layers 0 \(TurboQuant\w+Layer\)"):
        packed.save(tmp_path / "cache.safetensors")
    assert not list(tmp_path.iterdir())
