"""The growing store under every cache: any order of append, crop, select and reset, and snapshots of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from turboquant_core import (
    CacheCodec,
    MemoryFigures,
    PackedPast,
    PackedSequences,
    PageLayout,
    RawLayout,
    ReferenceProvider,
    VectorLayout,
)
from turboquant_core.slots import slots_at

LAYOUT = PageLayout(VectorLayout(64, 4, "int8"), VectorLayout(32, 3, "cubic"), page_size=16, kv_heads=2)
RAW = PageLayout(VectorLayout(64, 2, "int8"), RawLayout(32, 4), page_size=16, kv_heads=2)
TOKEN_BYTES = 2 * (32 + 2 + 12 + 2)
"""Codes and scales of a token of ``LAYOUT``, both KV heads."""


def vectors(tokens: int, batch: int = 2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    key = torch.randn(batch, 2, tokens, 64, generator=generator)
    return key, torch.randn(batch, 2, tokens, 32, generator=generator)


def store(batch: int = 2, layout: PageLayout = LAYOUT) -> PackedSequences:
    return PackedSequences(batch, CacheCodec.create(layout), ReferenceProvider(), torch.float32)


def filled(tokens: int, batch: int = 2) -> PackedSequences:
    sequences = store(batch)
    sequences.append(*vectors(tokens, batch))
    return sequences


def read(past: PackedPast) -> torch.Tensor:
    """Keys and values of everything held, side by side."""
    return torch.cat(past.read(0, past.length, torch.float32), dim=-1)


OPERATION = st.one_of(
    st.tuples(st.just("append"), st.integers(0, 40)),
    st.tuples(st.just("crop"), st.floats(0, 1)),
    st.tuples(st.just("select"), st.lists(st.integers(0, 7), min_size=1, max_size=4)),
    st.just(("reset", 0)),
)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(operations=st.lists(OPERATION, max_size=8), raw=st.booleans())
def test_any_operations_equal_those_on_a_tensor(operations: list[tuple[str, Any]], raw: bool) -> None:
    """The model is the decoded tensor itself, cut and indexed by torch."""
    sequences = store(layout=RAW if raw else LAYOUT)
    model = torch.zeros(2, 2, 0, 96)
    for step, (name, argument) in enumerate(operations):
        if name == "append":
            added = vectors(argument, len(model), step)
            alone = store(len(model), sequences.layout)
            alone.append(*added)
            sequences.append(*added)
            model = torch.cat((model, read(alone.past())), dim=2)
        elif name == "crop":
            length = int(argument * model.shape[2])
            sequences.crop(length)
            model = model[:, :, :length]
        elif name == "select":
            indices = torch.tensor(argument) % len(model)
            sequences.select(indices)
            model = model[indices]
        else:
            sequences.reset()
            model = model[:, :, :0]
        assert (sequences.batch, sequences.length) == (model.shape[0], model.shape[2])
        assert sequences.memory().stored == model.shape[0] * model.shape[2] * 2 * sequences.layout.token_bytes
        assert torch.equal(read(sequences.past()), model)


def test_bytes_held() -> None:
    sequences = filled(17)
    figures = sequences.memory()
    assert figures == MemoryFigures(
        stored=2 * 17 * TOKEN_BYTES, allocated=2 * 32 * TOKEN_BYTES, uncompressed=2 * 17 * 2 * 96 * 4
    )
    assert figures.allocated == sequences.past().pages.nbytes
    assert figures + figures == MemoryFigures(2 * figures.stored, 2 * figures.allocated, 2 * figures.uncompressed)


def test_crop_keeps_the_pages_and_reset_frees_them() -> None:
    sequences = filled(40)
    allocated = sequences.memory().allocated
    sequences.crop(1)
    assert sequences.memory().stored == 2 * TOKEN_BYTES
    assert sequences.memory().allocated == allocated
    sequences.reset()
    assert sequences.memory() == MemoryFigures(0, 0, 0)
    assert sequences.batch == 2


def test_a_reset_store_takes_tokens_again() -> None:
    sequences = filled(40)
    sequences.reset()
    sequences.append(*vectors(5, seed=3))
    fresh = store()
    fresh.append(*vectors(5, seed=3))
    assert torch.equal(read(sequences.past()), read(fresh.past()))


@pytest.mark.parametrize("held", [5, 16, 40])
def test_a_snapshot_keeps_what_it_saw(held: int) -> None:
    """Appends into the same page, growth, selection and reset leave it as it was."""
    sequences = filled(held)
    past = sequences.past()
    before, query = read(past), torch.randn(2, 4, 2, 64, generator=torch.Generator().manual_seed(4))
    attended = past.attend(query, scaling=0.1)
    for tokens in (1, 60):
        sequences.append(*vectors(tokens, seed=tokens))
    sequences.select(torch.tensor([1, 1, 0]))
    sequences.reset()
    sequences.append(*vectors(20, 3, seed=5))
    assert past.length == held
    assert torch.equal(read(past), before)
    for got, expected in zip(past.attend(query, scaling=0.1), attended, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("q_len", [1, 3, 20])
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"sinks": torch.tensor([1.0, 0.0, -1.0, 3.0])}], ids=str)
def test_attention_of_left_padded_sequences(q_len: int, options: dict[str, Any]) -> None:
    sequences, starts = filled(20), torch.tensor([0, 7], dtype=torch.int32)
    query = torch.randn(2, 4, q_len, 64, generator=torch.Generator().manual_seed(4))
    got = sequences.past().attend(query, scaling=0.2, seq_starts=starts, **options)
    keys, values = (x.repeat_interleave(2, 1).double() for x in sequences.past().read(0, 20, torch.float32))
    scores = 0.2 * query.double() @ keys.transpose(-1, -2)
    if "softcap" in options:
        scores = options["softcap"] * (scores / options["softcap"]).tanh()
    key, position = torch.arange(20), torch.arange(20 - q_len, 20).unsqueeze(1)
    hidden = (key > position) | (key < starts.view(2, 1, 1, 1))
    weights = scores.masked_fill(hidden, -torch.inf).exp()
    denominator = weights.sum(-1)
    if "sinks" in options:
        denominator = denominator + options["sinks"].double().exp().view(1, 4, 1)
    # A query that sees no key has zero weights: its output is zero, whatever divides them.
    out = weights / torch.where(denominator > 0, denominator, 1).unsqueeze(-1) @ values
    assert got.out.shape == (2, 4, q_len, 32)
    torch.testing.assert_close(got.out.double(), out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.lse.double(), denominator.log(), rtol=1e-5, atol=1e-5)


def test_a_failed_append_leaves_what_was_held() -> None:
    sequences = filled(5)
    before, key = read(sequences.past()), torch.zeros(2, 2, 30, 64)
    for value in (torch.zeros(2, 2, 30, 64), torch.zeros(2, 2, 29, 32), torch.zeros(2, 2, 30, 32, device="meta")):
        with pytest.raises(ValueError, match=r"values|meta"):
            sequences.append(key, value)
        assert sequences.length == 5
        assert sequences.memory().stored == 2 * 5 * TOKEN_BYTES
        assert torch.equal(read(sequences.past()), before)


def test_a_provider_that_fails_adds_no_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    sequences = filled(5)
    before = read(sequences.past())

    def fail(*_: object) -> None:
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(ReferenceProvider, "store", fail)
        with pytest.raises(MemoryError):
            sequences.append(*vectors(30, seed=1))
    assert sequences.length == 5
    sequences.append(*vectors(2, seed=2))
    assert torch.equal(read(sequences.past())[:, :, :5], before)


@pytest.mark.parametrize("indices", [torch.tensor([0, 2]), torch.tensor([-1, 0]), torch.tensor([0.0, 1.0])])
def test_a_failed_selection_leaves_what_was_held(indices: torch.Tensor) -> None:
    sequences = filled(5)
    before = read(sequences.past())
    with pytest.raises((ValueError, RuntimeError, IndexError)):
        sequences.select(indices)
    assert sequences.batch == 2
    assert torch.equal(read(sequences.past()), before)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="batch is 0"):
        store(0)
    sequences = filled(5)
    with pytest.raises(ValueError, match="cannot crop to -1 tokens: the cache holds 5"):
        sequences.crop(-1)
    past = sequences.past()
    for start, stop in ((-1, 2), (3, 2), (0, 6)):
        with pytest.raises(ValueError, match=rf"{start}\.\.{stop}"):
            past.read(start, stop, torch.float32)
    for shape in ((3, 4, 1, 64), (2, 4, 6, 64)):
        with pytest.raises(ValueError, match="batch 2 and 5 tokens"):
            past.attend(torch.zeros(shape), scaling=0.1)
    with pytest.raises(ValueError, match="multiple of 2"):
        past.attend(torch.zeros(2, 3, 1, 64), scaling=0.1)


def test_exported_pages_can_be_adopted() -> None:
    sequences, other = filled(37), store()
    pages = sequences.export()
    assert pages.shape == (3, 2, *LAYOUT.pages_shape(0)[1:])
    other.adopt(pages, 37)
    assert torch.equal(read(other.past()), read(sequences.past()))
    other.append(*vectors(3))
    assert sequences.length == 37
    for wrong, length in ((pages, 16), (pages.float(), 37), (pages[:, :1], 37)):
        with pytest.raises(ValueError, match="tokens need uint8"):
            other.adopt(wrong, length)


@settings(deadline=None)
@given(page_size=st.sampled_from([16, 48]), pages=st.permutations(range(6)), position=st.lists(st.integers(0, 47)))
def test_slots(page_size: int, pages: list[int], position: list[int]) -> None:
    tables = torch.tensor(pages, dtype=torch.int32).view(2, 3)
    got = slots_at(tables, torch.tensor(position, dtype=torch.int64), page_size)
    expected = [[int(row[p // page_size]) * page_size + p % page_size for p in position] for row in tables]
    assert got.tolist() == expected
    assert got.dtype == torch.int64
    assert slots_at(tables[1], torch.tensor(position, dtype=torch.int64), page_size).tolist() == expected[1]


class Watched(ReferenceProvider):
    """Remembers the last slot mapping."""

    def store(self, key: torch.Tensor, value: torch.Tensor, pages: Any, slot_mapping: torch.Tensor, codec: Any) -> None:
        """See :meth:`KernelProvider.store`."""
        self.slots = slot_mapping
        super().store(key, value, pages, slot_mapping, codec)


def test_slots_of_single_steps() -> None:
    """Through pages, after a crop and with other numbers of sequences; kernels get pointers of one alignment."""
    provider = Watched()
    sequences = PackedSequences(3, CacheCodec.create(LAYOUT), provider, torch.float32)
    sequences.append(*vectors(13, 3))
    for step in range(40):
        if step == 20:
            sequences.crop(30)
        if step in (10, 25):
            sequences.select(torch.tensor([0, 1, 1, 0] if step == 10 else [2]))
        sequences.append(*vectors(1, sequences.batch, step))
        last = torch.tensor([sequences.length - 1])
        assert torch.equal(provider.slots, slots_at(sequences.past().block_table, last, 16).flatten())
        assert provider.slots.data_ptr() % 16 == 0
        assert provider.slots.is_contiguous()


def test_seq_lens_at_hand_are_those_of_what_is_held() -> None:
    sequences = filled(14, 3)
    for step in range(6):
        sequences.append(*vectors(1, 3, step))
        past = sequences.past()
        assert past.seq_lens is not None
        assert past.seq_lens.tolist() == [past.length] * 3
        assert past.seq_lens.data_ptr() % 16 == 0
    sequences.crop(17)
    assert sequences.past().seq_lens.tolist() == [17] * 3  # type: ignore[union-attr]
    sequences.crop(14)
    assert sequences.past().seq_lens is None
    sequences.select(torch.tensor([1]))
    sequences.append(*vectors(1, 1))
    assert sequences.past().seq_lens.tolist() == [15]  # type: ignore[union-attr]
