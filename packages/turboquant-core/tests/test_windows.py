"""Exact first and recent tokens beside packed ones, against a model that decides for each token what it must be."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from turboquant_core import (
    CacheCodec,
    PackedSequences,
    PageLayout,
    RawLayout,
    ReferenceProvider,
    TurboQuantKVCache,
    VectorLayout,
    WindowedPast,
    WindowedSequences,
    Windows,
)
from turboquant_core.recent_tokens import ROOM

LAYOUT = PageLayout(VectorLayout(32, 3, "int8"), VectorLayout(16, 2, "cubic"), page_size=16, kv_heads=2)
RAW = PageLayout(VectorLayout(32, 3, "int8"), RawLayout(16, 4), page_size=16, kv_heads=2)
CENTER = torch.linspace(-1, 1, 64).view(2, 32)


def vectors(batch: int, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    key = torch.randn(batch, 2, tokens, 32, generator=generator)
    return key, torch.randn(batch, 2, tokens, 16, generator=generator)


def store(
    windows: Windows, batch: int = 2, layout: PageLayout = LAYOUT, center: torch.Tensor | None = None
) -> WindowedSequences:
    codec = CacheCodec.create(layout, center=center)
    return WindowedSequences(PackedSequences(batch, codec, ReferenceProvider(), torch.float32), windows)


class Model:
    """Every token exact and as packing makes it, with a flag that says which one holds."""

    def __init__(self, sequences: WindowedSequences) -> None:
        self.windows, self.codec = sequences.windows, sequences.packed.codec
        self.exact = torch.zeros(sequences.packed.batch, 2, 0, 48)
        self.decoded = self.exact
        self.packed = 0

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        alone = PackedSequences(len(keys), self.codec, ReferenceProvider(), torch.float32)
        alone.append(keys, values)
        decoded = torch.cat(alone.past().read(0, keys.shape[2], torch.float32), -1)
        self.exact = torch.cat((self.exact, torch.cat((keys, values), -1)), 2)
        self.decoded = torch.cat((self.decoded, decoded), 2)
        length = self.exact.shape[2]
        if self.packed or length > self.windows.start_after:
            self.packed = max(self.packed, length - self.windows.recent_tokens)

    def crop(self, length: int) -> None:
        self.exact, self.decoded = self.exact[:, :, :length], self.decoded[:, :, :length]
        self.packed = min(self.packed, length)

    def select(self, indices: torch.Tensor) -> None:
        self.exact, self.decoded = self.exact[indices], self.decoded[indices]

    def held(self, starts: list[int]) -> torch.Tensor:
        """Keys and values side by side."""
        position = torch.arange(self.exact.shape[2])
        sink = torch.stack([(position >= s) & (position < s + self.windows.sink_tokens) for s in starts])
        is_exact = sink | (position >= self.packed)
        return torch.where(is_exact[:, None, :, None], self.exact, self.decoded)


def attention(
    query: torch.Tensor, held: torch.Tensor, starts: list[int], center: torch.Tensor | None = None, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Float64 attention of the last positions over ``held``, written out."""
    length, q_len = held.shape[2], query.shape[2]
    held = held.double().repeat_interleave(query.shape[1] // 2, 1)
    keys, values = held[..., :32], held[..., 32:]
    if center is not None:
        keys = keys - center.double().repeat_interleave(query.shape[1] // 2, 0).unsqueeze(1)
    scores = 0.3 * query.double() @ keys.transpose(-1, -2)
    if options.get("softcap"):
        scores = options["softcap"] * torch.tanh(scores / options["softcap"])
    position, at = torch.arange(length), torch.arange(length - q_len, length).view(-1, 1)
    visible = (position <= at) & (position > at - (options.get("window") or length))
    visible = visible & (position >= torch.tensor(starts).view(-1, 1, 1, 1))
    scores = scores.masked_fill(~visible, -torch.inf)
    logits = scores
    if options.get("sinks") is not None:
        sink = options["sinks"].double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        logits = torch.cat((scores, sink), -1)
    lse = logits.logsumexp(-1)
    weights = torch.where(visible, torch.exp(scores - lse.unsqueeze(-1)), 0.0)
    return weights @ values, lse


def check(past: WindowedPast, held: torch.Tensor, starts: list[int], q_len: int, **options: Any) -> None:
    query = torch.randn(len(held), 4, q_len, 32, generator=torch.Generator().manual_seed(9))
    out, lse = attention(query, held, starts, past.packed.codec.key.center, **options)
    first = torch.tensor(starts).int()
    # Without padding, or where the host knows of it, a single query takes another way.
    for seq_starts, latest in [(first, None), (first, max(starts))] + [(None, None)] * (not any(starts)):
        got = past.attend(query, scaling=0.3, seq_starts=seq_starts, latest_start=latest, **options)
        torch.testing.assert_close(got.out.double(), out, rtol=0, atol=2e-5)
        torch.testing.assert_close(got.lse.double(), lse, rtol=1e-5, atol=2e-5)


OPERATION = st.one_of(
    st.tuples(st.just("append"), st.integers(1, 30)),
    st.tuples(st.just("append"), st.integers(1, 3)),
    st.tuples(st.just("crop"), st.floats(0, 1)),
    st.tuples(st.just("select"), st.lists(st.integers(0, 7), min_size=1, max_size=3)),
)
WINDOWS = st.builds(Windows, st.integers(0, 5), st.integers(0, 20), st.sampled_from([0, 0, 12, 40]))


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    windows=WINDOWS,
    operations=st.lists(OPERATION, min_size=1, max_size=7),
    padding=st.integers(0, 25),
    raw=st.booleans(),
    q_len=st.integers(1, 6),
    options=st.sampled_from([{}, {"window": 7}, {"softcap": 2.0}, {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])}]),
)
def test_any_operations_equal_the_model(
    windows: Windows, operations: list[tuple[str, Any]], padding: int, raw: bool, q_len: int, options: dict[str, Any]
) -> None:
    sequences = store(windows, layout=RAW if raw else LAYOUT)
    model = Model(sequences)
    padded = [0, padding]
    for seed, (name, argument) in enumerate([("append", 9), *operations]):
        if name == "append":
            added = vectors(len(padded), argument, seed)
            after = model.exact.shape[2] + argument
            sequences.append(*added, torch.tensor([min(p, after) for p in padded]))
            model.append(*added)
        elif name == "crop":
            # Not into the padding: what is visible first is known already.
            length = model.exact.shape[2]
            low = min(max(padded), length)
            kept = low + int(argument * (length - low))
            sequences.crop(kept)
            model.crop(kept)
        else:
            indices = torch.tensor(argument) % len(padded)
            sequences.select(indices)
            model.select(indices)
            padded = [padded[i] for i in indices.tolist()]
        length = model.exact.shape[2]
        assert sequences.length == length
        assert sequences.packed.length == model.packed
        past, held = sequences.past(), model.held(padded)
        assert torch.equal(torch.cat(past.read(0, length, torch.float32), -1), held)
        if length:
            check(past, held, [min(p, length) for p in padded], min(q_len, length), **options)


@pytest.mark.parametrize("windows", [Windows(3, 8), Windows(0, 8), Windows(3, 0)])
def test_centred_keys(windows: Windows) -> None:
    """Scores without the centre on both sides of the merge, the centre back in what is read."""
    sequences = store(windows, center=CENTER)
    model = Model(sequences)
    for seed, tokens in enumerate((21, 1, 3)):
        keys, values = vectors(2, tokens, seed)
        sequences.append(keys + CENTER.unsqueeze(1), values)
        model.append(keys + CENTER.unsqueeze(1), values)
        check(sequences.past(), model.held([0, 0]), [0, 0], min(2, tokens))


@pytest.mark.parametrize(
    ("center", "options"),
    [
        (None, {}),
        (CENTER, {}),
        (None, {"softcap": 2.0}),
        (None, {"sinks": torch.tensor([0.5, -3.0, 90.0, -200.0])}),
    ],
)
def test_a_step_without_padding(center: torch.Tensor | None, options: dict[str, Any]) -> None:
    sequences = store(Windows(recent_tokens=5), batch=3, center=center)
    model = Model(sequences)
    for tokens in (19, 1, 1, 1):
        pair = vectors(3, tokens, tokens)
        for one in (sequences, model):
            one.append(*pair)
        # An extreme packed part must neither vanish nor overflow.
        for scale in (1, 60):
            past = sequences.past()
            query = scale * torch.randn(3, 4, 1, 32, generator=torch.Generator().manual_seed(2))
            got = past.attend(query, scaling=0.3, **options)
            out, lse = attention(query, model.held([0, 0, 0]), [0, 0, 0], center, **options)
            torch.testing.assert_close(got.out.double(), out, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(got.lse.double(), lse, rtol=1e-5, atol=1e-4)


def test_a_range_is_read_across_both_borders() -> None:
    sequences = store(Windows(4, 6))
    sequences.append(*vectors(2, 30, 0))
    past = sequences.past()
    whole = torch.cat(past.read(0, 30, torch.float32), -1)
    for start, stop in ((0, 30), (2, 5), (3, 26), (25, 29), (24, 24), (30, 30)):
        assert torch.equal(torch.cat(past.read(start, stop, torch.float32), -1), whole[:, :, start:stop])
    with pytest.raises(ValueError, match=r"range 3\.\.31 leaves the cache, which holds 30 tokens"):
        past.read(3, 31, torch.float32)


def test_a_token_is_packed_once() -> None:
    """Bytes of a token do not change after it was packed, whatever is cropped and appended behind it."""
    sequences = store(Windows(2, 5))
    sequences.append(*vectors(2, 20, 0))
    before = torch.cat(sequences.packed.past().read(0, 15, torch.float32), -1)
    sequences.crop(17)
    assert sequences.packed.length == 15
    assert sequences.past().recent.keys.shape[2] == 2
    sequences.append(*vectors(2, 9, 1))
    assert sequences.packed.length == 21
    assert torch.equal(torch.cat(sequences.packed.past().read(0, 15, torch.float32), -1), before)


def test_nothing_is_packed_before_start_after() -> None:
    sequences = store(Windows(0, 4, start_after=16))
    for tokens, packed in ((10, 0), (6, 0), (1, 13), (1, 14)):
        sequences.append(*vectors(2, tokens, tokens))
        assert sequences.packed.length == packed
    sequences.crop(3)
    sequences.append(*vectors(2, 5, 1))
    assert sequences.packed.length == 4, "what began to be packed goes on"
    sequences.crop(0)
    sequences.append(*vectors(2, 5, 1))
    assert sequences.packed.length == 0


def test_memory_counts_both_windows_and_keeps_no_prompt_alive() -> None:
    sequences = store(Windows(4, 8))
    sequences.append(*vectors(2, 100, 0))
    token = 2 * 48 * 4
    exact, sinks = 2 * 8 * token, 2 * 4 * token
    packed = sequences.packed.memory()
    figures = sequences.memory()
    assert packed.stored == 2 * 92 * LAYOUT.token_bytes * 2
    assert figures.stored == packed.stored + exact + sinks
    assert figures.allocated == packed.allocated + exact + sinks
    assert figures.uncompressed == 2 * 100 * 2 * 48 * 4
    assert sequences.past().recent.keys.untyped_storage().nbytes() == 2 * 2 * 8 * 32 * 4


def test_a_snapshot_does_not_change() -> None:
    sequences = store(Windows(3, 6))
    sequences.append(*vectors(2, 20, 0))
    past = sequences.past()
    before = torch.cat(past.read(0, 20, torch.float32), -1)
    sequences.append(*vectors(2, 30, 1))
    sequences.select(torch.tensor([1]))
    assert past.length == 20
    assert torch.equal(torch.cat(past.read(0, 20, torch.float32), -1), before)


def test_reset_and_move() -> None:
    sequences = store(Windows(3, 6))
    sequences.append(*vectors(2, 20, 0), torch.tensor([0, 5]))
    sequences.move("cpu")
    assert sequences.past().length == 20
    sequences.reset()
    assert sequences.length == 0
    assert sequences.memory().stored == sequences.sinks.nbytes
    assert sequences.sinks.starts.tolist() == [0, 0]


def test_the_standalone_cache_has_windows() -> None:
    cache = TurboQuantKVCache(1, 2, 32, 2, sink_tokens=2, recent_tokens=4)
    keys = vectors(1, 20, 0)[0]
    cache.append(keys, keys)
    read = cache.read().keys
    assert torch.equal(read[:, :, :2], keys[:, :, :2])
    assert torch.equal(read[:, :, 16:], keys[:, :, 16:])
    assert not torch.equal(read[:, :, 2:16], keys[:, :, 2:16])
    query = torch.randn(1, 2, 1, 32)
    assert cache.attend(query).out.shape == (1, 2, 1, 32)


@pytest.mark.parametrize("name", ["sink_tokens", "recent_tokens", "start_after"])
@pytest.mark.parametrize("number", [-1, 1.5, True, "4"])
def test_bad_numbers(name: str, number: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} is {number!r}; it must be a number of tokens"):
        Windows(**{name: number})


def test_bad_tensors_add_nothing() -> None:
    sequences = store(Windows(2, 4))
    sequences.append(*vectors(2, 5, 0))
    keys, values = vectors(2, 3, 0)
    with pytest.raises(ValueError, match="tokens must be equal"):
        sequences.append(keys, values[:, :, :2])
    with pytest.raises(ValueError, match="cannot crop to 6 tokens: the cache holds 5"):
        sequences.crop(6)
    with pytest.raises(ValueError, match="the cache has batch 2 and 5 tokens"):
        sequences.past().attend(torch.zeros(2, 4, 6, 32), scaling=1.0)
    assert sequences.length == 5


def test_dropped_pages_leave_what_follows() -> None:
    sequences = store(Windows(0, 5))
    sequences.append(*vectors(2, 60, 0))
    past = sequences.past()
    before = torch.cat(past.read(32, 60, torch.float32), -1)
    sequences.drop(2)
    assert (sequences.length, past.length) == (28, 60)
    assert torch.equal(torch.cat(sequences.past().read(0, 28, torch.float32), -1), before)
    assert sequences.packed.memory().allocated == 2 * 2 * 2 * LAYOUT.chunk_bytes
    sequences.append(*vectors(2, 30, 1))
    assert torch.equal(torch.cat(sequences.past().read(0, 23, torch.float32), -1), before[:, :, :23])
    with pytest.raises(ValueError, match="cannot drop 4 pages: 53 tokens fill 3"):
        sequences.drop(4)
    with pytest.raises(ValueError, match="the first 2 tokens are sinks"):
        store(Windows(2)).drop(0)


def test_moved_pages_come_back() -> None:
    """The meta device shows that every tensor moves, where no second device is."""
    sequences = store(Windows(2, 4))
    sequences.append(*vectors(2, 20, 0))
    sequences.move("meta")
    kept = (
        sequences.past().packed.pages,
        sequences.past().packed.block_table,
        *sequences.recent,
        *sequences.sinks.kept,
    )
    assert {tensor.device.type for tensor in (*kept, sequences.sinks.starts)} == {"meta"}
    assert sequences.device.type == "meta"
    assert sequences.codec.key.device.type == "cpu"


def grow(sequences: WindowedSequences, tokens: int, seed: int) -> None:
    sequences.append(*vectors(sequences.packed.batch, tokens, seed))


@pytest.mark.parametrize(
    "between",
    [
        lambda sequences: None,
        lambda sequences: sequences.crop(sequences.length - 3),
        lambda sequences: sequences.select(torch.tensor([1, 0])),
    ],
    ids=["steps", "crop", "select"],
)
def test_what_was_handed_out_stays_as_it_is(between: Any) -> None:
    """Over more steps than there is room for behind a window: nobody's tokens are written over."""
    sequences = store(Windows(recent_tokens=5))
    grow(sequences, 20, 0)
    seen = []
    for step in range(60):
        if step % 7 == 6:
            between(sequences)
        recent = sequences.past().recent
        seen.append((recent, tuple(x.clone() for x in recent)))
        grow(sequences, 1, step)
    for recent, was in seen:
        assert all(torch.equal(*pair) for pair in zip(recent, was, strict=True))


def test_a_copy_goes_on_by_itself() -> None:
    sequences = store(Windows(recent_tokens=5))
    for step, tokens in enumerate((20, 1, 1)):
        grow(sequences, tokens, step)
    copied = copy.deepcopy(sequences)
    grow(sequences, 1, 7)
    for step in range(20):
        grow(copied, 1, step)
    assert sequences.length == 23
    assert torch.equal(sequences.recent.keys[:, :, -1:], vectors(2, 1, 7)[0])
    assert torch.equal(copied.recent.keys[:, :, -1:], vectors(2, 1, 19)[0])


def test_recent_tokens_keep_their_gradient() -> None:
    sequences = store(Windows(recent_tokens=5))
    grow(sequences, 20, 0)
    grow(sequences, 1, 1)
    key, value = (x.requires_grad_() for x in vectors(2, 1, 2))
    sequences.append(key, value)
    sequences.recent.keys.sum().backward()
    assert key.grad is not None
    assert torch.equal(key.grad, torch.ones_like(key))


def test_room_behind_a_window_counts_as_allocated() -> None:
    sequences = store(Windows(recent_tokens=5))
    grow(sequences, 20, 0)
    before = sequences.memory()
    grow(sequences, 1, 1)
    after = sequences.memory()
    token = 2 * 2 * (32 + 16) * 4
    assert after.stored - before.stored == 2 * 2 * LAYOUT.token_bytes
    assert after.allocated - before.allocated >= ROOM * token
