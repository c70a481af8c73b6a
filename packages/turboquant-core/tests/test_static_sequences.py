"""Static pages against growing ones: the same tokens, whatever happens to them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from turboquant_core import (
    CacheCodec,
    PackedSequences,
    PageLayout,
    ReferenceProvider,
    VectorLayout,
    WindowedSequences,
    Windows,
)
from turboquant_core.device_checks import require_before
from turboquant_core.static_sequences import StaticSequences

LAYOUT = PageLayout(VectorLayout(32, 3, "int8"), VectorLayout(16, 2, "cubic"), page_size=16, kv_heads=2)
CENTER = torch.linspace(-1, 1, 64).view(2, 32)
CAPACITY = 70
WINDOWS = [Windows(), Windows(2), Windows(0, 5), Windows(3, 20), Windows(1, 4, 9), Windows(0, 0, 12)]


def pair(
    windows: Windows, batch: int = 2, *, center: torch.Tensor | None = None, **options: Any
) -> tuple[WindowedSequences, StaticSequences]:
    codec = CacheCodec.create(LAYOUT, center=center)
    growing = WindowedSequences(PackedSequences(batch, codec, ReferenceProvider(), torch.float32), windows)
    options = {"capacity": CAPACITY, **options}
    return growing, StaticSequences(batch, codec, ReferenceProvider(), torch.float32, windows=windows, **options)


def vectors(batch: int, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    key = torch.randn(batch, 2, tokens, 32, generator=generator)
    return key, torch.randn(batch, 2, tokens, 16, generator=generator)


def check(growing: WindowedSequences, static: StaticSequences, starts: torch.Tensor | None, window: int | None) -> None:
    length = growing.length
    assert static.length == length
    if not length:
        return
    expected, got = (store.past().read(0, length, torch.float32) for store in (growing, static))
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))
    q_len = min(3, length)
    query = torch.randn(growing.batch, 4, q_len, 32, generator=torch.Generator().manual_seed(length))
    options = {"scaling": 0.3, "seq_starts": starts, "window": window}
    attended, wanted = (store.past().attend(query, **options) for store in (static, growing))
    torch.testing.assert_close(attended.out, wanted.out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(attended.lse, wanted.lse, rtol=1e-5, atol=1e-5)


STEP = st.one_of(
    st.tuples(st.just("append"), st.integers(0, 30)),
    st.tuples(st.just("crop"), st.integers(0, 12)),
    st.tuples(st.just("select"), st.permutations([0, 1])),
)


@settings(max_examples=60, deadline=None)
@given(
    windows=st.sampled_from(WINDOWS),
    steps=st.lists(STEP, min_size=1, max_size=8),
    starts=st.sampled_from([None, (0, 3)]),
    window=st.sampled_from([None, 7]),
    centered=st.booleans(),
)
def test_like_growing_pages(
    windows: Windows, steps: list[Any], starts: tuple[int, int] | None, window: int | None, centered: bool
) -> None:
    growing, static = pair(windows, center=CENTER if centered else None)
    begins = None if starts is None else torch.tensor(starts, dtype=torch.int32)
    for seed, (action, argument) in enumerate(steps):
        if action == "append":
            new = vectors(2, min(argument, CAPACITY - growing.length), seed)
            for store in (growing, static):
                store.append(*new, begins)
        elif action == "crop":
            growing.crop(max(growing.length - argument, 0))
            static.drop_last(argument)
        elif starts is None:
            for store in (growing, static):
                store.select(torch.tensor(argument))
        check(growing, static, begins, window)


def test_a_step_is_one_graph_and_moves_nothing() -> None:
    growing, static = pair(Windows(2, 5))
    starts = torch.tensor([0, 3], dtype=torch.int32)
    for store in (growing, static):
        store.append(*vectors(2, 11, 0), starts)
    places = [tensor.data_ptr() for tensor in static.tensors]

    def step(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        static.append(keys, values, starts)
        return static.past().attend(query, scaling=0.3, seq_starts=starts).out * 2

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=False)
    for seed in range(1, 30):
        query, new = torch.randn(2, 4, 1, 32), vectors(2, 1, seed)
        growing.append(*new, starts)
        expected = growing.past().attend(query, scaling=0.3, seq_starts=starts).out
        torch.testing.assert_close(compiled(query, *new), expected * 2, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1
    assert [tensor.data_ptr() for tensor in static.tensors] == places


def test_a_sliding_window_needs_less_room() -> None:
    growing, static = pair(Windows(), room=16 + 8)
    assert static.pages.shape[0] == 2 * 2
    for seed, tokens in enumerate([50, 1, 8, 1, 10]):
        new = vectors(2, tokens, seed)
        for store in (growing, static):
            store.append(*new)
        query = torch.randn(2, 4, min(tokens, 8), 32)
        options: dict[str, Any] = {"scaling": 0.3, "window": 17}
        got, expected = (store.past().attend(query, **options).out for store in (static, growing))
        assert torch.equal(got, expected)


def test_no_room_is_an_error_and_changes_nothing() -> None:
    _, static = pair(Windows(1, 2))
    static.append(*vectors(2, 69, 0))
    before = copy.deepcopy([static.pages, static.filled])
    with pytest.raises(ValueError, match="has room for 70 tokens, which 2 more exceed"):
        static.append(*vectors(2, 2, 1))
    with pytest.raises(ValueError, match="has room for 70 tokens"):
        torch.compile(static.append, backend="aot_eager", fullgraph=True)(*vectors(2, 2, 1))
    assert torch.equal(static.pages, before[0])
    assert torch.equal(static.filled, before[1])
    static.append(*vectors(2, 1, 1))


def test_reset_forgets() -> None:
    growing, static = pair(Windows(2, 5, 9))
    static.append(*vectors(2, 40, 0))
    static.reset()
    for store in (growing, static):
        store.append(*vectors(2, 20, 1))
    check(growing, static, None, None)


def test_memory_counts_what_can_be_read() -> None:
    _, static = pair(Windows(), room=32)
    assert static.memory().stored == 0
    static.append(*vectors(2, 50, 0))
    assert static.memory().stored == 2 * 2 * 32 * LAYOUT.token_bytes == static.memory().allocated


def test_what_does_not_fit_is_named() -> None:
    _, static = pair(Windows())
    with pytest.raises(ValueError, match=r"keys have shape \(3, 2, 1, 32\)"):
        static.append(*vectors(3, 1, 0))
    with pytest.raises(ValueError, match="static pages hold 2 sequences; 3 were chosen"):
        static.select(torch.tensor([0, 0, 1]))
    with pytest.raises(ValueError, match="batch is 2 and capacity 0; both must be at least 1"):
        pair(Windows(), capacity=0)


def test_tokens_of_a_page_that_was_written_over_have_its_place() -> None:
    _, static = pair(Windows(), room=32)
    static.append(*vectors(2, 40, 0))
    before = static.pages.clone()
    static.append(*vectors(2, 3, 1))
    changed = (before != static.pages).flatten(1).any(1).nonzero().flatten()
    # Position 40 is in the third page, which is held in the place of the first of each sequence.
    assert changed.tolist() == [0, 1]


def test_a_condition_of_a_graph_is_kept() -> None:
    """Nothing reads what it gives, and still it is checked, before what comes after it."""

    def step(x: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
        use = x + 1
        require_before(use, (x < limit).all(), "x is too large")
        return use * 2

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    x = torch.ones(3)
    assert torch.equal(compiled(x, torch.tensor(2.0)), torch.full((3,), 4.0))
    for call in (step, compiled):
        with pytest.raises(ValueError, match="x is too large"):
            call(x, torch.tensor(1.0))
    arguments = (torch.ones(3), torch.tensor(True), "never")
    torch.library.opcheck(torch.ops.turboquant_core.require_before, arguments)
