"""The reference's attention against a plain float64 softmax over the decoded keys and values."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from turboquant_core import Attended, CacheCodec, PageLayout, RawLayout, ReferenceProvider, VectorLayout

PROVIDER = ReferenceProvider()
SCALING = 0.15
PAGE = 16
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "window of one": {"window": 1},
    "window": {"window": 18},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": torch.tensor([1.0, -2.0, 5.0, 0.0])},
    "starts": {"seq_starts": [0, 0, 3, 20, 33]},
    "all": {"window": 20, "softcap": 2.0, "sinks": torch.ones(4), "seq_starts": [0, 1, 0, 9, 2]},
}


def layout(value: VectorLayout | RawLayout | None = None, page_size: int = PAGE) -> PageLayout:
    return PageLayout(
        VectorLayout(64, 4, "int8"), value or VectorLayout(64, 4, "cubic"), page_size=page_size, kv_heads=2
    )


class Pages:
    """Sequences of ``lengths`` tokens in shuffled pages; bytes of no token are NaN scales."""

    def __init__(self, page_layout: PageLayout, lengths: list[int], dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(len(lengths))
        self.layout, self.lengths, self.dtype = page_layout, lengths, dtype
        self.codec = CacheCodec.create(page_layout)
        size, columns = page_layout.page_size, max(1, *(page_layout.pages_for(n) for n in lengths))
        count = len(lengths) * columns
        self.table = torch.randperm(count, generator=generator).view(len(lengths), columns).int()
        self.pages = torch.full(page_layout.pages_shape(count), 0xFF, dtype=torch.uint8)
        slots = [int(self.table[row, j // size]) * size + j % size for row, n in enumerate(lengths) for j in range(n)]
        shape = (sum(lengths), page_layout.kv_heads)
        keys = torch.randn(*shape, page_layout.key.head_dim, generator=generator).to(dtype)
        values = torch.randn(*shape, page_layout.value.head_dim, generator=generator).to(dtype)
        PROVIDER.store(keys, values, self.pages, torch.tensor(slots), self.codec)

    def query(self, tokens: int) -> torch.Tensor:
        return torch.randn(tokens, 4, 64, generator=torch.Generator().manual_seed(9)).to(self.dtype)

    def attend(self, query: torch.Tensor, **options: Any) -> Attended:
        if options.get("seq_starts") is not None:
            options["seq_starts"] = torch.tensor(options["seq_starts"], dtype=torch.int32)
        lengths = torch.tensor(self.lengths, dtype=torch.int32)
        return PROVIDER.attend(query, self.pages, self.table, lengths, self.codec, scaling=SCALING, **options)

    def decoded(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one sequence, float64 ``[kv_heads, length, head_dim]``."""
        kept = PROVIDER.gather(
            self.pages, self.table[row : row + 1], self.codec, start=0, stop=self.lengths[row], dtype=self.dtype
        )
        return kept.keys[0].double(), kept.values[0].double()

    def expected(self, query: torch.Tensor, q_lens: list[int], **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        starts = options.pop("seq_starts", None) or [0] * len(q_lens)
        bounds = itertools.pairwise([0, *itertools.accumulate(q_lens)])
        results = [
            softmax_attention(query[first:last].double(), *self.decoded(row), start=starts[row], **options)
            for row, (first, last) in enumerate(bounds)
        ]
        return torch.cat([out for out, _ in results]), torch.cat([lse for _, lse in results])


def softmax_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    start: int = 0,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One query and one head at a time, from the definition."""
    (tokens, heads, _), length = query.shape, keys.shape[1]
    out = torch.zeros(tokens, heads, values.shape[-1], dtype=torch.float64)
    lse = torch.full((tokens, heads), -torch.inf, dtype=torch.float64)
    for i, head in itertools.product(range(tokens), range(heads)):
        position = length - tokens + i
        first = max(start, 0 if window is None else position - window + 1)
        kv_head = head * keys.shape[0] // heads
        scores = SCALING * keys[kv_head, first : position + 1] @ query[i, head]
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        denominator = scores.exp().sum() + (0 if sinks is None else sinks[head].double().exp())
        if denominator > 0:
            out[i, head] = scores.exp() / denominator @ values[kv_head, first : position + 1]
            lse[i, head] = denominator.log()
    return out, lse


def check(got: Attended, expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    torch.testing.assert_close(got.out.double(), expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.lse.double(), expected[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_options(options: dict[str, Any]) -> None:
    pages = Pages(layout(), [3, 16, 17, 30, 40])
    query = pages.query(15)
    check(pages.attend(query, **options), pages.expected(query, [3] * 5, **options))


@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("beyond", [-1, 0, 1])
def test_lengths_around_a_page(page_size: int, beyond: int) -> None:
    pages = Pages(layout(page_size=page_size), [page_size + beyond, 1, 2 * page_size + beyond])
    query = pages.query(3)
    check(pages.attend(query), pages.expected(query, [1, 1, 1]))


def test_one_token_is_its_value() -> None:
    pages = Pages(layout(), [1])
    query = pages.query(1)
    got = pages.attend(query)
    keys, values = pages.decoded(0)
    torch.testing.assert_close(got.out[0].double(), values[:, 0].repeat_interleave(2, 0), rtol=1e-5, atol=1e-5)
    score = SCALING * (query[0].double() * keys[:, 0].repeat_interleave(2, 0)).sum(-1)
    torch.testing.assert_close(got.lse[0].double(), score, rtol=1e-5, atol=1e-5)


def test_a_sequence_of_no_tokens_gives_zero() -> None:
    pages = Pages(layout(), [0, 20])
    query = pages.query(2)
    got = pages.attend(query)
    assert not got.out[0].any()
    assert (got.lse[0] == -torch.inf).all()
    expected = Pages.expected(pages, query, [1, 1])
    torch.testing.assert_close(got.out[1].double(), expected[0][1], rtol=1e-5, atol=1e-5)


def test_queries_before_the_first_token_see_nothing() -> None:
    pages = Pages(layout(), [2])
    query = pages.query(5)
    got = pages.attend(query)
    assert not got.out[:3].any()
    assert (got.lse[:3] == -torch.inf).all()
    torch.testing.assert_close(got.out[3:], pages.attend(query[3:]).out)


@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_ragged_queries(options: dict[str, Any]) -> None:
    pages, q_lens = Pages(layout(), [20, 5, 33, 40, 48]), [1, 5, 0, 17, 2]
    query = pages.query(sum(q_lens))
    start_loc = torch.tensor([0, *itertools.accumulate(q_lens)], dtype=torch.int32)
    got = pages.attend(query, query_start_loc=start_loc, **options)
    check(got, pages.expected(query, q_lens, **options))


def test_query_tokens_of_no_sequence_are_zero() -> None:
    pages = Pages(layout(), [20, 5])
    query = pages.query(6)
    got = pages.attend(query, query_start_loc=torch.tensor([0, 1, 3], dtype=torch.int32))
    assert not got.out[3:].any()
    assert (got.lse[3:] == -torch.inf).all()


@pytest.mark.parametrize("split", [1, 16, 29])
def test_two_halves_merge_by_their_lse(split: int) -> None:
    """Early keys alone, late keys alone by ``seq_starts``; the sink stands in the late half only."""
    pages, length = Pages(layout(), [30]), 30
    query, sinks = pages.query(1), torch.tensor([0.5, -1.0, 2.0, 0.0])
    whole, late = pages.attend(query, sinks=sinks), pages.attend(query, sinks=sinks, seq_starts=[split])
    pages.lengths = [split]
    early = pages.attend(query)
    lse = torch.logaddexp(early.lse, late.lse)
    parts = [half.out * (half.lse - lse).exp().unsqueeze(-1) for half in (early, late)]
    torch.testing.assert_close(sum(parts), whole.out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, whole.lse, rtol=1e-5, atol=1e-5)
    assert split < length


@pytest.mark.parametrize("value_head_dim", [32, 128, 160])
def test_values_of_another_head_dim(value_head_dim: int) -> None:
    pages = Pages(layout(VectorLayout(value_head_dim, 3, "cubic")), [20, 33])
    query = pages.query(4)
    got = pages.attend(query)
    assert got.out.shape == (4, 4, value_head_dim)
    check(got, pages.expected(query, [2, 2]))


@pytest.mark.parametrize(
    ("itemsize", "dtype", "tolerance"),
    [(4, torch.float32, 1e-5), (2, torch.float16, 2e-3), (2, torch.bfloat16, 2e-2)],
)
def test_raw_values(itemsize: int, dtype: torch.dtype, tolerance: float) -> None:
    pages = Pages(layout(RawLayout(96, itemsize)), [20, 33], dtype)
    query = pages.query(4)
    got = pages.attend(query)
    # The test's own keys come through one rounding to the query's dtype.
    out, lse = pages.expected(query, [2, 2])
    assert got.out.dtype == dtype
    assert got.lse.dtype == torch.float32
    torch.testing.assert_close(got.out.double(), out, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(got.lse.double(), lse, rtol=tolerance, atol=tolerance)


def test_large_scores_stay_finite() -> None:
    pages = Pages(layout(), [40])
    query = 1e4 * pages.query(1)
    got = pages.attend(query)
    keys, values = pages.decoded(0)
    scores = SCALING * (query[0].double().unsqueeze(1) @ keys.repeat_interleave(2, 0).transpose(1, 2)).squeeze(1)
    best = values.repeat_interleave(2, 0)[torch.arange(4), scores.argmax(-1)]
    torch.testing.assert_close(got.out[0].double(), best, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(got.lse[0].double(), scores.amax(-1), rtol=1e-5, atol=0.0)


def test_given_memory_is_written_and_returned() -> None:
    pages = Pages(layout(), [20])
    query, out = pages.query(2), torch.full((2, 4, 64), math.nan)
    got = pages.attend(query, out=out)
    assert got.out is out
    assert torch.equal(out, pages.attend(query).out)
