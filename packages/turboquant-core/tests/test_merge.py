"""Two parts of an attention against float64 attention over all keys."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from turboquant_core import Attended, merge_attended

HEAD_DIM = 8


def attention(scores: torch.Tensor, values: torch.Tensor) -> Attended:
    """Float64 attention of ``scores`` ``[queries, keys]``; a row that sees nothing is 0 with lse -inf."""
    lse = torch.logsumexp(scores, -1)
    weights = torch.where(scores.isneginf(), 0.0, torch.exp(scores - lse.unsqueeze(-1)))
    return Attended(weights @ values, lse)


def part(scores: torch.Tensor, values: torch.Tensor, dtype: torch.dtype) -> Attended:
    """What a kernel returns: out rounded to its dtype, lse in float32."""
    out, lse = attention(scores, values)
    return Attended(out.to(dtype), lse.float())


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    keys=st.integers(0, 12),
    more_keys=st.integers(0, 12),
    magnitude=st.sampled_from([1e-3, 1.0, 30.0, 1e4]),
    hidden=st.floats(0, 1),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
    seed=st.integers(0, 2**16),
)
def test_parts_give_the_whole(
    keys: int, more_keys: int, magnitude: float, hidden: float, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = magnitude * torch.randn(5, keys + more_keys, generator=generator, dtype=torch.float64)
    scores = scores.masked_fill(torch.rand(scores.shape, generator=generator) < hidden, -math.inf)
    values = torch.randn(keys + more_keys, HEAD_DIM, generator=generator, dtype=torch.float64)
    expected = attention(scores, values)
    parts = part(scores[:, :keys], values[:keys], dtype), part(scores[:, keys:], values[keys:], dtype)
    merged = merge_attended(*parts)
    assert merged.out.dtype == dtype
    assert merged.lse.dtype == torch.float32
    # lse is float32: its rounding, relative to its size, becomes the error of a weight.
    slack = 4 * torch.finfo(torch.float32).eps * max(magnitude, 1.0) * 5
    tolerance = slack + 3 * torch.finfo(dtype).eps * float(values.abs().max() if len(values) else 0)
    torch.testing.assert_close(merged.out.double(), expected.out, rtol=0, atol=tolerance)
    torch.testing.assert_close(merged.lse.double(), expected.lse, rtol=1e-6, atol=1e-5)


def test_a_part_without_keys_changes_nothing_whatever_its_output() -> None:
    some = Attended(torch.randn(3, HEAD_DIM), torch.randn(3))
    for garbage in (math.nan, math.inf, 7.0):
        none = Attended(torch.full((3, HEAD_DIM), garbage), torch.full((3,), -math.inf))
        for merged in (merge_attended(some, none), merge_attended(none, some)):
            assert torch.equal(merged.out, some.out)
            assert torch.equal(merged.lse, some.lse)
        neither = merge_attended(none, none)
        assert torch.equal(neither.out, torch.zeros(3, HEAD_DIM))
        assert neither.lse.isneginf().all()


def test_half_precision_is_weighted_in_float32() -> None:
    """Two halves of one mean: the rounding to bfloat16 happens once, at the end."""
    parts = [Attended(torch.full((1, 1), x, dtype=torch.bfloat16), torch.zeros(1)) for x in (1.0, 1.0078125)]
    parts.append(Attended(torch.full((1, 1), 1.015625, dtype=torch.bfloat16), torch.tensor([1.5])))
    first = merge_attended(parts[0], parts[2])
    weight = 1 / (1 + math.exp(1.5))
    assert first.out.item() == torch.tensor(weight + (1 - weight) * 1.015625).bfloat16().item()


def test_a_sink_belongs_to_one_part() -> None:
    """A sink enlarges the denominator of the part that has it, and so that of the whole."""
    scores = torch.tensor([[0.5, -1.0, 2.0]], dtype=torch.float64)
    values = torch.eye(3, dtype=torch.float64)
    with_sink = attention(torch.cat((scores, torch.tensor([[1.0]])), -1), torch.cat((values, torch.zeros(1, 3))))
    left = attention(torch.cat((scores[:, :2], torch.tensor([[1.0]])), -1), torch.cat((values[:2], torch.zeros(1, 3))))
    parts = Attended(left.out.float(), left.lse.float()), part(scores[:, 2:], values[2:], torch.float32)
    merged = merge_attended(*parts)
    torch.testing.assert_close(merged.out.double(), with_sink.out, rtol=0, atol=1e-6)
    torch.testing.assert_close(merged.lse.double(), with_sink.lse, rtol=0, atol=1e-6)


def test_the_order_of_parts_does_not_matter() -> None:
    one = Attended(torch.randn(2, 3, HEAD_DIM), torch.randn(2, 3))
    two = Attended(torch.randn(2, 3, HEAD_DIM), torch.randn(2, 3))
    torch.testing.assert_close(merge_attended(one, two).out, merge_attended(two, one).out, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("out", "lse", "message"),
    [
        (torch.zeros(3, 8), torch.zeros(2), "lse is torch.float32"),
        (torch.zeros(2, 8), torch.zeros(2, dtype=torch.float64), "lse is torch.float64"),
        (torch.zeros(2, 4), torch.zeros(2), "same queries"),
        (torch.zeros(2, 8).half(), torch.zeros(2), "one dtype"),
    ],
)
def test_parts_that_do_not_fit(out: torch.Tensor, lse: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        merge_attended(Attended(torch.zeros(2, 8), torch.zeros(2)), Attended(out, lse))
