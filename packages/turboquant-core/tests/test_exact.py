"""Exact rows follow from a page's tokens, however these came, and hold what every query needs."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from turboquant_core import CacheCodec, LayoutError, ReferenceProvider
from turboquant_core.codec_arguments import cache_integers
from turboquant_core.codec_arguments import page_layout as page_layout_of
from turboquant_core.exact import ExactRowsProvider, attend_with_exact, exact_row, exact_views, read_exact
from turboquant_core.layout import ExactRows, PageLayout
from turboquant_core.testing.cases import page_layout

PAGE = 16
PROVIDER = ReferenceProvider()


def layout_with(first: int, ring: int, itemsize: int = 4, page_size: int = PAGE) -> PageLayout:
    exact = ExactRows(first, ring, itemsize)
    return page_layout(4, 3, 32, value_head_dim=16, page_size=page_size, itemsize=4, exact=exact)


def test_sizes() -> None:
    plain, layout = layout_with(0, 0), layout_with(4, 9)
    assert plain.slot_bytes == plain.token_bytes
    assert layout.token_bytes == plain.token_bytes == 16 + 2 + 6 + 2
    assert layout.exact_key_offset == plain.chunk_bytes
    assert layout.exact_value_offset == layout.exact_key_offset + 13 * 32 * 4
    assert layout.chunk_bytes == layout.exact_value_offset + 13 * 16 * 4
    assert layout.chunk_bytes == PAGE * layout.slot_bytes
    assert layout.pages_shape(3) == (3, 2, layout.chunk_bytes)


@settings(deadline=None)
@given(first=st.integers(0, 48), ring=st.integers(0, 48), itemsize=st.sampled_from([2, 4]))
def test_a_page_is_whole_bytes_a_token(first: int, ring: int, itemsize: int) -> None:
    layout = layout_with(first, ring, itemsize, 48)
    needed = layout.exact_value_offset + (first + ring) * 16 * itemsize
    assert needed <= layout.chunk_bytes < needed + 48
    assert layout.chunk_bytes % 48 == 0


def test_bad_rows_are_refused() -> None:
    with pytest.raises(LayoutError, match="exact rows: first is -1"):
        ExactRows(first=-1)
    with pytest.raises(LayoutError, match=r"exact rows: ring is 2\.5"):
        ExactRows(ring=2.5)  # type: ignore[arg-type]
    with pytest.raises(LayoutError, match="exact rows: itemsize is 1"):
        ExactRows(itemsize=1)
    with pytest.raises(LayoutError, match=r"page_size is 16; ExactRows\(first=0, ring=17, itemsize=2\) need pages"):
        layout_with(0, 17, 2)


def test_rows_of_another_size_are_not_read() -> None:
    layout = layout_with(4, 4, 4)
    pages = torch.zeros(layout.pages_shape(1), dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"exact rows have 4 bytes a coordinate; they cannot hold torch\.float16"):
        exact_views(pages, layout, torch.float16)


def test_the_reference_has_exact_rows() -> None:
    assert isinstance(PROVIDER, ExactRowsProvider)


class Sequence:
    """One sequence whose tokens can be written in pieces, and written over."""

    def __init__(self, layout: PageLayout, length: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.layout, self.codec = layout, CacheCodec.create(layout)
        count = layout.pages_for(length)
        self.table = torch.randperm(count, generator=generator).int()
        self.pages = torch.full(layout.pages_shape(count), 0xFF, dtype=torch.uint8)
        self.key = torch.randn(length, layout.kv_heads, 32, generator=generator)
        self.value = torch.randn(length, layout.kv_heads, 16, generator=generator)

    def write(self, start: int, stop: int, key: Tensor | None = None) -> None:
        position = torch.arange(start, stop)
        slots = self.table[position // PAGE].long() * PAGE + position % PAGE
        key, value = (self.key if key is None else key)[start:stop], self.value[start:stop]
        PROVIDER.store(key, value, self.pages, slots, self.codec)
        PROVIDER.store_exact(key, value, self.pages, slots, self.layout)

    def attend(self, query: Tensor, length: int, recent: int) -> Tensor:
        lengths = torch.tensor([length], dtype=torch.int32)
        found = attend_with_exact(
            PROVIDER, query, self.pages, self.table.unsqueeze(0), lengths, self.codec, recent=recent, scaling=0.2
        )
        return found.out


@settings(deadline=None, max_examples=25)
@given(
    first=st.integers(0, 6),
    ring=st.integers(1, 16),
    cuts=st.lists(st.integers(0, 60), max_size=6),
)
def test_pages_do_not_depend_on_how_their_tokens_came(first: int, ring: int, cuts: list[int]) -> None:
    layout = layout_with(first, ring)
    whole, pieces = Sequence(layout, 60), Sequence(layout, 60)
    whole.write(0, 60)
    bounds = sorted({0, 60, *cuts})
    for start, stop in itertools.pairwise(bounds):
        pieces.write(start, stop)
    assert torch.equal(whole.pages, pieces.pages)


@settings(deadline=None, max_examples=30)
@given(
    first=st.integers(0, 5),
    recent=st.integers(0, 12),
    drafts=st.integers(0, 4),
    steps=st.lists(st.integers(0, 4), min_size=1, max_size=6),
    prompt=st.integers(1, 40),
)
def test_rejected_drafts_leave_no_trace(first: int, recent: int, drafts: int, steps: list[int], prompt: int) -> None:
    """A step writes its last accepted token and drafts, of which some are written over by the next."""
    layout = layout_with(first, recent + drafts if recent else 0)
    length = prompt + (drafts + 1) * len(steps) + drafts + 1
    plain, speculative = Sequence(layout, length), Sequence(layout, length)
    query = torch.randn(length, 4, 32, generator=torch.Generator().manual_seed(1))
    wrong = plain.key + 7
    speculative.write(0, prompt)
    plain.write(0, prompt)
    start = prompt
    for accepted in (min(step, drafts) for step in steps):
        mixed = torch.cat((plain.key[: start + accepted + 1], wrong[start + accepted + 1 :]))
        speculative.write(start, start + drafts + 1, mixed)
        found = speculative.attend(query[start : start + drafts + 1], start + drafts + 1, recent)
        for i in range(accepted + 1):
            plain.write(start + i, start + i + 1)
            expected = plain.attend(query[start + i : start + i + 1], start + i + 1, recent)
            torch.testing.assert_close(found[i : i + 1], expected, rtol=1e-5, atol=1e-6)
        start += accepted + 1


def test_exact_tokens_are_read_by_position() -> None:
    sequence = Sequence(layout_with(4, 6), 37)
    sequence.write(0, 37)
    for start, stop in ((0, 4), (31, 37), (10, 16), (26, 32)):
        keys, values = read_exact(
            sequence.pages, sequence.table, sequence.layout, start=start, stop=stop, dtype=torch.float32
        )
        assert torch.equal(keys, sequence.key[start:stop])
        assert torch.equal(values, sequence.value[start:stop])
    rows = exact_row(torch.tensor([0, 3, 4, 9, 16, 22]), sequence.layout)
    assert rows.tolist() == [0, 3, 8, 7, 4, 4]


def test_a_layout_without_exact_rows_has_the_same_bytes() -> None:
    plain = layout_with(0, 0)
    assert replace(plain, exact=ExactRows()) == PageLayout(plain.key, plain.value, PAGE, plain.kv_heads)
    first, second = Sequence(plain, 20), Sequence(layout_with(2, 4), 20)
    first.write(0, 20)
    second.write(0, 20)
    assert torch.equal(first.pages, second.pages[..., : plain.chunk_bytes])


def test_exact_rows_reach_custom_operators() -> None:
    for layout in (layout_with(2, 4), layout_with(0, 0), page_layout(4, None, 32, exact=ExactRows(4, 8, 2))):
        assert page_layout_of(tuple(cache_integers(CacheCodec.create(layout)))) == layout
