"""Bits given out among parts by what each costs."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turboquant_core import lloyd_max
from turboquant_core.doctor.allocation import allocate

ERROR = {bits: lloyd_max(bits).mse for bits in (2, 3, 4)}


def total(costs: list[float], bits: tuple[int, ...]) -> float:
    return sum(cost * ERROR[b] for cost, b in zip(costs, bits, strict=True))


@settings(deadline=None, max_examples=80)
@given(
    costs=st.lists(st.floats(0, 1e3, allow_subnormal=False), min_size=1, max_size=6),
    average=st.sampled_from([2, 2.3, 2.5, 2.75, 3, 3.5, 3.9, 4]),
)
def test_no_allocation_of_as_many_bits_costs_less(costs: list[float], average: float) -> None:
    got = tuple(allocate(dict(enumerate(costs)), average).values())
    assert sum(got) <= average * len(costs) + 1e-6
    assert sum(got) > average * len(costs) - 1
    same = [bits for bits in product((2, 3, 4), repeat=len(costs)) if sum(bits) == sum(got)]
    assert total(costs, got) <= min(total(costs, bits) for bits in same) * (1 + 1e-9) + 1e-12


def test_equal_costs_share_equally_and_a_large_one_is_served_first() -> None:
    assert set(allocate(dict.fromkeys("abcd", 1.0), 3).values()) == {3}
    assert allocate({"a": 100.0, "b": 1.0, "c": 1.0, "d": 0.0}, 2.75) == {"a": 4, "b": 3, "c": 2, "d": 2}


@pytest.mark.parametrize(
    ("costs", "average", "message"),
    [({}, 3, "there must be some"), ({0: -1.0}, 3, "none below 0"), ({0: float("nan")}, 3, "none below 0")]
    + [({0: 1.0}, average, f"average is {average}") for average in (1.9, 4.1)],
)
def test_bad_input(costs: Any, average: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        allocate(costs, average)
