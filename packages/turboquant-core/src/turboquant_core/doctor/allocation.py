"""Bits for each layer's keys and values, wider where errors cost more, at a given average."""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Mapping
from typing import TypeVar

from ..codebook import lloyd_max
from ..layout import WIDTHS

Part = TypeVar("Part", bound=Hashable)


def allocate(costs: Mapping[Part, float], average: float) -> dict[Part, int]:
    """The whole widths of least total cost, where a part's cost is proportional to its squared error.

    Every part starts with the fewest bits, and a bit goes where it saves most until one more would exceed the average.
    The error falls ever more slowly with the width, so that no allocation of as many bits costs less.

    Args:
        costs: of each part at one and the same width; nonnegative, in any unit.
        average: bits of a coordinate, over parts of equal size.

    Raises:
        ValueError: no parts, a negative cost, or an average that no allocation has.
    """
    least, most = min(WIDTHS), max(WIDTHS)
    if not costs or not min(costs.values()) >= 0:
        raise ValueError(f"costs are {dict(costs)}; there must be some, and none below 0")
    if not least <= average <= most:
        raise ValueError(f"average is {average}; it must be {least} to {most} bits")
    given = dict.fromkeys(costs, least)
    order = list(costs)
    queue = [(-_saving(costs[part], least), place) for place, part in enumerate(order)]
    heapq.heapify(queue)
    # Rounded first: 2.9 - 2 times 10 is a little below 9.
    for _ in range(int(round((average - least) * len(costs), 6))):
        _, place = heapq.heappop(queue)
        part = order[place]
        given[part] += 1
        if given[part] < most:
            heapq.heappush(queue, (-_saving(costs[part], given[part]), place))
    return given


def _saving(cost: float, bits: int) -> float:
    return cost * (lloyd_max(bits).mse - lloyd_max(bits + 1).mse)
