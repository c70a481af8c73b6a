"""Prompts over pages with exact tokens against attention in float64, and the pages they leave behind."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from turboquant_core import CacheCodec, ReferenceProvider
from turboquant_core.exact import attend_with_exact
from turboquant_core.layout import ExactRows
from turboquant_vllm import plan as planning
from turboquant_vllm.errors import OptionError, UnsupportedError
from turboquant_vllm.exact_context import ExactContext
from turboquant_vllm.options import LayerBits, Options
from turboquant_vllm.packing import LayerShape
from turboquant_vllm.plan import prompt_plan
from turboquant_vllm.prompts import PromptAttention
from turboquant_vllm.raw_attention import Scoring, torch_attention
from turboquant_vllm.windows import check_exact_layer, check_exact_rows, exact_provider, exact_rows

HEADS, KV_HEADS, HEAD_DIM, PAGE = 4, 2, 16, 16
PROVIDER = ReferenceProvider()
SHAPE = LayerShape(KV_HEADS, HEAD_DIM, 4)


class Sequences:
    """Sequences in pages, of which each step writes and attends to a piece."""

    def __init__(self, lengths: list[int], first: int, recent: int, **scoring: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        self.first, self.recent, self.lengths = first, recent, lengths
        layout = SHAPE.page_layout(LayerBits(), PAGE, ExactRows(first, recent, 4))
        width = layout.pages_for(max(lengths))
        self.table = torch.randperm(len(lengths) * width, generator=generator).view(len(lengths), width).int()
        self.codec = CacheCodec.create(layout)
        self.pages = torch.full(layout.pages_shape(len(lengths) * width), 0xFF, dtype=torch.uint8)
        self.keys, self.values = (
            [torch.randn(n, KV_HEADS, HEAD_DIM, generator=generator) for n in lengths] for _ in range(2)
        )
        self.queries = [torch.randn(n, HEADS, HEAD_DIM, generator=generator) for n in lengths]
        self.scoring = Scoring(0.3, None, scoring.pop("softcap", None))
        self.sinks: Tensor | None = scoring.pop("sinks", None)

    def step(self, pieces: list[tuple[int, int]], *, raw: bool) -> list[Tensor]:
        """Write positions ``start .. stop - 1`` of each sequence, and attend from them."""
        starts = [0]
        for start, stop in pieces:
            starts.append(starts[-1] + stop - start)
        plan = prompt_plan(starts, [stop for _, stop in pieces], self.table, 0)
        assert plan is not None
        key, value, query = (
            torch.cat([x[start:stop] for x, (start, stop) in zip(tensors, pieces, strict=True)])
            for tensors in (self.keys, self.values, self.queries)
        )
        slots = torch.cat(
            [self._slots(row, start, stop) for row, (start, stop) in enumerate(pieces)],
        )
        layout = self.codec.layout
        PROVIDER.store(key, value, self.pages, slots, self.codec)
        exact = ExactContext.before_writing(self.recent, self.pages, layout, plan, torch.float32)
        PROVIDER.store_exact(key, value, self.pages, slots, layout)
        attention = PromptAttention(torch_attention, self.scoring, PROVIDER, self.codec, self.pages, self.sinks, exact)
        out = torch.full_like(query, torch.nan)
        if raw:
            attention.attend_raw(query, key, value, plan, out)
        elif self.recent:
            attention.attend_recent(query, key, value, plan, out)
        else:
            attention.attend_packed(query, plan, out)
        return list(out.split([stop - start for start, stop in pieces]))

    def _slots(self, row: int, start: int, stop: int) -> Tensor:
        position = torch.arange(start, stop)
        return self.table[row, position // PAGE].long() * PAGE + position % PAGE

    def expected(self, row: int, start: int, stop: int, *, raw: bool) -> Tensor:
        """Float64 attention, one query and head at a time."""
        packed = PROVIDER.gather(
            self.pages, self.table[row : row + 1], self.codec, start=0, stop=stop, dtype=torch.float32
        )
        out = torch.zeros(stop - start, HEADS, HEAD_DIM, dtype=torch.float64)
        for position in range(start, stop):
            where = torch.arange(position + 1)
            border = start + min(1 - self.recent, 0) if raw else position + 1 - self.recent
            exact = ((where < self.first) | (where >= border)).unsqueeze(1)
            for head in range(HEADS):
                group = head // (HEADS // KV_HEADS)
                k = torch.where(exact, self.keys[row][where, group], packed.keys[0, group, where]).double()
                v = torch.where(exact, self.values[row][where, group], packed.values[0, group, where]).double()
                scores = self.scoring.scaling * (k @ self.queries[row][position, head].double())
                if self.scoring.softcap is not None:
                    scores = self.scoring.softcap * torch.tanh(scores / self.scoring.softcap)
                if self.sinks is not None:
                    scores = torch.cat((scores, self.sinks[head : head + 1].double()))
                out[position - start, head] = torch.softmax(scores, 0)[: len(v)] @ v
        return out


steps = st.lists(st.integers(1, 25), min_size=1, max_size=4)


@pytest.mark.parametrize("raw", [False, True])
@settings(max_examples=12, deadline=None)
@given(
    cuts=st.lists(steps, min_size=1, max_size=2),
    first=st.sampled_from([0, 3, 5]),
    recent=st.sampled_from([0, 1, 6, 16]),
    options=st.sampled_from([{}, {"softcap": 3.0}, {"sinks": torch.linspace(-1, 2, HEADS)}]),
    piece=st.sampled_from([7, 16, 1000]),
)
def test_prompts_see_what_they_should(
    raw: bool, cuts: list[list[int]], first: int, recent: int, options: dict[str, Any], piece: int
) -> None:
    cuts = [(row * 4)[:4] for row in cuts]
    sequences = Sequences([sum(row) for row in cuts], first, recent, **options)
    at = [0] * len(cuts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "PREFIX_TOKENS", piece)
        for index in range(4):
            pieces = [(start, start + row[index]) for start, row in zip(at, cuts, strict=True)]
            found = sequences.step(pieces, raw=raw)
            for row, (start, stop) in enumerate(pieces):
                expected = sequences.expected(row, start, stop, raw=raw)
                torch.testing.assert_close(found[row].double(), expected, rtol=1e-5, atol=1e-5)
            at = [stop for _, stop in pieces]


@settings(max_examples=8, deadline=None)
@given(cut=st.integers(1, 59), first=st.sampled_from([0, 4]), recent=st.sampled_from([0, 1, 9]))
def test_decoded_tokens_see_what_prompts_see(cut: int, first: int, recent: int) -> None:
    sequences = Sequences([60], first, recent)
    (whole,) = sequences.step([(0, 60)], raw=False)
    later = Sequences([60], first, recent)
    later.step([(0, cut)], raw=False)
    layout = later.codec.layout
    for position in range(cut, min(cut + 3, 60)):
        slots = later._slots(0, position, position + 1)
        own = slice(position, position + 1)
        PROVIDER.store(later.keys[0][own], later.values[0][own], later.pages, slots, later.codec)
        PROVIDER.store_exact(later.keys[0][own], later.values[0][own], later.pages, slots, layout)
        found = attend_with_exact(
            PROVIDER,
            later.queries[0][own],
            later.pages,
            later.table,
            torch.tensor([position + 1], dtype=torch.int32),
            later.codec,
            recent=recent,
            scaling=0.3,
        )
        torch.testing.assert_close(found.out, whole[own], rtol=1e-5, atol=1e-6)


def test_a_shared_page_that_is_written_in_this_step() -> None:
    """The second sequence begins with the page that the first one fills in the same step."""
    sequences = Sequences([16, 24], 3, 6)
    sequences.table[1, 0] = sequences.table[0, 0]
    sequences.keys[1][:16], sequences.values[1][:16] = sequences.keys[0], sequences.values[0]
    sequences.step([(0, 9), (16, 16)], raw=False)
    found = sequences.step([(9, 16), (16, 24)], raw=False)
    for row, (start, stop) in enumerate([(9, 16), (16, 24)]):
        expected = sequences.expected(row, start, stop, raw=False)
        torch.testing.assert_close(found[row].double(), expected, rtol=1e-5, atol=1e-5)


CONFIG = SimpleNamespace(speculative_config=SimpleNamespace(num_speculative_tokens=3))


def test_rows_of_a_page() -> None:
    assert exact_rows(Options(sink_tokens=4, recent_tokens=24), CONFIG, 2) == ExactRows(4, 30, 2)
    assert exact_rows(Options(sink_tokens=4), CONFIG, 2) == ExactRows(4, 0, 2)
    assert exact_rows(Options(), CONFIG, 4).rows == 0


def test_what_makes_no_sense() -> None:
    wide = LayerShape(8, 128, 2)
    check_exact_rows(ExactRows(4, 24), wide, LayerBits(), 64)
    check_exact_rows(ExactRows(), wide, LayerBits(), 16)
    with pytest.raises(OptionError, match=r"need 4 \+ 24 rows a block, and blocks have 16 tokens: set --"):
        check_exact_rows(ExactRows(4, 24), wide, LayerBits(), 16)
    with pytest.raises(OptionError, match="makes 580 bytes a token and head, no fewer than the 512 without packing"):
        check_exact_rows(ExactRows(4, 24), wide, LayerBits(), 32)
    options = Options(recent_tokens=8)
    check_exact_layer(Options(), sliding_window=5, shares_pages=True)
    check_exact_layer(options, sliding_window=None, shares_pages=False)
    with pytest.raises(UnsupportedError, match="a layer with a sliding window of 5"):
        check_exact_layer(options, sliding_window=5, shares_pages=False)
    with pytest.raises(UnsupportedError, match="reads another layer's pages"):
        check_exact_layer(options, sliding_window=None, shares_pages=True)


def test_a_provider_without_exact_rows_is_refused() -> None:
    class Six:
        name = "six"

    assert exact_provider(PROVIDER) is PROVIDER
    with pytest.raises(UnsupportedError, match="kernel provider 'six' has no tokens in full precision inside pages"):
        exact_provider(Six())  # type: ignore[arg-type]
