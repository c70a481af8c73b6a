"""Static caches of models that keep a state beside keys and values: what the growing cache gives, in one graph."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import DynamicCache, masking_utils

from turboquant_hf import TurboQuantCache, TurboQuantStaticCache, patch_model, static_cache, turboquant
from turboquant_hf.compat import CACHE_ARGUMENT, GENERATE_MASKS_LACK_WINDOWS, StaticIndexedLayer
from turboquant_hf.memory import tensors_of

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

ROOM = 48
PACKED: dict[str, Any] = {"page_size": 16, "compress_sliding": True}
NAMES = [known(RECURRENT), known(INDEXED), known(CONVOLVED)]

pytestmark = pytest.mark.skipif(StaticIndexedLayer is None, reason="no such layers of fixed room in this release")


@pytest.fixture
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[Any, TurboQuantStaticCache, DynamicCache]]:
    """A model, a packed cache of fixed room that loses nothing, and the stock cache that grows, both with a prompt."""
    model = special_model(request.param)
    with identity_provider() as provider:
        pair = TurboQuantStaticCache(model.config, ROOM, provider=provider, **PACKED), DynamicCache(config=model.config)
        for cache in pair:
            step(model, cache, BATCH, LENGTH)
        yield model, *pair


def generated(model: Any, **options: Any) -> Any:
    """Of a left-padded batch of three; at least two beams make what is held change places."""
    ids = torch.randint(2, 90, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :5], mask[2, :1] = 0, 0
    return model.generate(
        ids * mask, attention_mask=mask, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, **options
    )


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", [known(RECURRENT), known("zamba2"), known(INDEXED), known("glm_moe_dsa")])
def test_generate_with_a_static_cache_by_name(name: str, beams: int) -> None:
    model = copy.deepcopy(special_model(name))
    stock = generated(model, num_beams=beams).sequences
    with identity_provider() as provider, turboquant(model, verify=False, provider=provider, **PACKED):
        static = generated(model, num_beams=beams, cache_implementation="static")
        growing = generated(model, num_beams=beams)
    assert torch.equal(static.sequences, growing.sequences)
    assert torch.equal(static.sequences, stock)
    assert type(static[CACHE_ARGUMENT]) is TurboQuantStaticCache
    held = [layer for layer in static[CACHE_ARGUMENT].layers if hasattr(layer, "keys")]
    assert {type(layer).__name__ for layer in held} <= {"TurboQuantStaticHybridLayer", "TurboQuantStaticIndexedLayer"}


@pytest.mark.parametrize("name", NAMES)
def test_is_verified(name: str) -> None:
    model = copy.deepcopy(special_model(name))
    cache = patch_model(model, max_cache_len=ROOM, recent_tokens=0, **PACKED)
    assert cache.verification.error < 1e-3


@pytest.mark.parametrize("pair", NAMES, indirect=True)
@pytest.mark.parametrize(
    "operation", [lambda cache: None, lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0]))], ids=["no", "reorder"]
)
def test_as_the_stock_cache(pair: tuple[Any, Any, Any], operation: Any) -> None:
    model, *caches = pair
    for cache in caches:
        operation(cache)
    assert_same_steps(model, *caches)


@pytest.mark.parametrize("pair", [known(INDEXED)], indirect=True)
@pytest.mark.parametrize("tokens", [0, 5])
def test_keys_of_an_indexer_are_cropped(pair: tuple[Any, Any, Any], tokens: int) -> None:
    model, *caches = pair
    for cache in caches:
        cache.crop(-tokens)
    assert_same_steps(model, *caches)


@pytest.mark.parametrize("pair", [known(INDEXED)], indirect=True)
def test_positions_that_a_model_assigns_follow_their_sequences(pair: tuple[Any, Any, Any]) -> None:
    _, packed, _ = pair
    packed.layers[0].indexer_position_ids = torch.arange(BATCH)[None, :, None].expand(1, BATCH, LENGTH)
    packed.reorder_cache(torch.tensor([2, 0, 0]))
    assert packed.layers[0].indexer_position_ids[0, :, 0].tolist() == [2, 0, 0]


@pytest.mark.parametrize("pair", NAMES, indirect=True)
def test_nothing_is_left_after_a_reset(pair: tuple[Any, Any, Any]) -> None:
    model, packed, _ = pair
    assert_nothing_is_left_after_a_reset(model, packed)


@pytest.mark.parametrize("pair", NAMES, indirect=True)
def test_a_copy_has_a_state_of_its_own(pair: tuple[Any, Any, Any]) -> None:
    model, packed, stock = pair
    copied = copy.deepcopy(packed)
    step(model, packed, BATCH, 4)
    assert_same_steps(model, copied, stock)


@pytest.mark.parametrize("pair", NAMES, indirect=True)
@pytest.mark.parametrize(
    ("operation", "message"),
    [
        (lambda cache: cache.layers[0].offload(), "a static cache cannot be offloaded"),
        (lambda cache: cache.batch_repeat_interleave(2), "which has no batch_repeat_interleave.*reorder_cache"),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), "which has no batch_select_indices"),
    ],
    ids=["offload", "repeat", "select"],
)
def test_what_fixed_room_cannot_do_changes_nothing(pair: tuple[Any, Any, Any], operation: Any, message: str) -> None:
    model, packed, stock = pair
    with pytest.raises(ValueError, match=message):
        operation(packed)
    assert_same_steps(model, packed, stock)


@pytest.mark.parametrize("pair", [known(RECURRENT), known(CONVOLVED)], indirect=True)
@pytest.mark.parametrize(
    ("operation", "message"),
    [
        (lambda cache: cache.crop(-2), "linear-attention state, which cannot go back 2 tokens: use TurboQuantCache"),
        (lambda cache: cache.activate_past_recording(), "which cannot record its past: use TurboQuantCache"),
    ],
    ids=["crop", "record"],
)
def test_a_linear_state_cannot_go_back(pair: tuple[Any, Any, Any], operation: Any, message: str) -> None:
    model, packed, stock = pair
    assert not packed.is_croppable
    with pytest.raises(ValueError, match=message):
        operation(packed)
    assert_same_steps(model, packed, stock)


@pytest.mark.parametrize("name", [known(RECURRENT), known(INDEXED)])
def test_states_count_in_memory(name: str) -> None:
    model = special_model(name)
    static, growing = TurboQuantStaticCache(model.config, ROOM, **PACKED), TurboQuantCache(model.config, **PACKED)
    for cache in (static, growing):
        step(model, cache, 1, LENGTH)
    one, other = static.memory(), growing.memory()
    assert one.stored == other.stored
    assert one.uncompressed == other.uncompressed
    if name == INDEXED:
        assert static.layers[0].memory().allocated - static.layers[0].store.memory().allocated == (
            growing.layers[0].indexer_keys.nbytes * ROOM // LENGTH
        )


@pytest.mark.parametrize("pair", [known(RECURRENT)], indirect=True)
def test_a_length_that_was_asked_for_stays(pair: tuple[Any, Any, Any]) -> None:
    """Models ask before an update and use the answer after it."""
    model, packed, _ = pair
    before = packed.get_seq_length()
    step(model, packed)
    assert (int(before), int(packed.get_seq_length())) == (LENGTH, LENGTH + 1)


class TestMasksOfGenerate:
    """Of a sliding window with a linear-attention state beside it."""

    @pytest.mark.skipif(not GENERATE_MASKS_LACK_WINDOWS, reason="generate() makes them right in this release")
    @pytest.mark.parametrize("compress_sliding", [True, False])
    def test_without_a_window_are_refused(self, compress_sliding: bool) -> None:
        model = copy.deepcopy(special_model(CONVOLVED))
        cache = patch_model(model, max_cache_len=ROOM, compress_sliding=compress_sliding)
        with pytest.raises(ValueError, match=r"have a sliding window and a linear-attention state.* TurboQuantCache"):
            generated(model, **{CACHE_ARGUMENT: cache})
        assert cache.get_seq_length() == 0

    @pytest.mark.parametrize("name", [known(CONVOLVED)])
    def test_with_a_window_are_the_models(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """As they will be once Transformers makes them right."""
        masks = masking_utils.LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING
        right = {**masks["hybrid_sliding"], "sliding_attention": masking_utils.create_sliding_window_causal_mask}
        monkeypatch.setitem(masks, "hybrid_sliding", right)
        monkeypatch.setattr(static_cache, "GENERATE_MASKS_LACK_WINDOWS", False)
        model = special_model(name)
        with identity_provider() as provider:
            cache = TurboQuantStaticCache(model.config, ROOM, provider=provider, **PACKED)
            got = generated(model, **{CACHE_ARGUMENT: cache}).sequences
        assert torch.equal(got, generated(model).sequences)


class OneGraph:
    """Steps over a packed cache of fixed room, single tokens in one compiled graph, and the same over a growing one."""

    def __init__(self, name: str) -> None:
        options = {**PACKED, "recent_tokens": 3, "center_keys": False}
        self.model = copy.deepcopy(special_model(name))
        patch_model(self.model, verify=False)
        self.static = TurboQuantStaticCache(self.model.config, ROOM, **options)
        self.growing = TurboQuantCache(self.model.config, **options)
        torch.compiler.reset()
        counters.clear()
        self.compiled = torch.compile(self.model.forward, backend="aot_eager", fullgraph=True, dynamic=False)

    @property
    def places(self) -> list[int]:
        """Addresses of the states."""
        return [tensor.data_ptr() for layer in self.static.layers for tensor in tensors_of(layer.state)]

    def steps(self, *widths: int) -> None:
        for tokens in widths:
            run = self.compiled if tokens == 1 else self.model
            got, expected = step(run, self.static, BATCH, tokens), step(self.model, self.growing, BATCH, tokens)
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)

    def both(self, operation: str, *arguments: Any) -> None:
        for cache in (self.static, self.growing):
            getattr(cache, operation)(*arguments)


@pytest.mark.parametrize("name", NAMES)
def test_one_graph_whatever_is_done_to_the_cache(name: str) -> None:
    run = OneGraph(name)
    with torch._dynamo.config.patch(error_on_recompile=True):
        run.steps(LENGTH, 1, 1)
        places = run.places
        run.both("reorder_cache", torch.tensor([2, 0, 0]))
        run.steps(1, 1)
        if name == INDEXED:
            run.both("crop", -2)
            run.steps(1)
        run.both("reset")
        run.steps(LENGTH - 3, 1, 1)
    assert counters["stats"]["unique_graphs"] == 1
    # A CUDA graph knows nothing else.
    assert run.places == places


@pytest.mark.parametrize("name", [known(INDEXED)])
def test_a_prompt_may_be_compiled_once_the_pages_are_there(name: str) -> None:
    run = OneGraph(name)
    sizes: dict[str, Any] = {"batch_size": BATCH, "num_heads": 1, "head_dim": 64}
    run.static.early_initialization(**sizes, dtype=torch.float32, device=torch.device("cpu"))
    torch.testing.assert_close(
        step(run.compiled, run.static, BATCH, LENGTH), step(run.model, run.growing, BATCH, LENGTH), rtol=1e-3, atol=1e-4
    )
    run.steps(1, 1)
