"""Lloyd-Max codebooks: solved once and shipped for N(0, 1) and the usual head_dims, solved on demand for others."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files

from ..integers import integer, integer_of
from .codebook import Codebook, mirrored
from .density import SMALLEST_HEAD_DIM, coordinate_density, mean_squared_error
from .lloyd import solve

MAX_BITS = 8
TEXTBOOK_BITS = tuple(range(1, MAX_BITS + 1))


@cache
def shipped() -> dict[str, dict[str, list[float]]]:
    """The data file: density (``"gaussian"`` or a head_dim) to bits to the positive levels, ascending."""
    return dict(json.loads(files(__package__).joinpath("data/lloyd_max.json").read_text("utf-8")))


def lloyd_max(bits: int, head_dim: int | None = None) -> Codebook:
    """The optimal scalar codebook of a coordinate scaled to unit variance.

    Args:
        bits: 1 to 8.
        head_dim: None for N(0, 1), else the exact density of a coordinate on the unit sphere times sqrt(head_dim).

    Raises:
        ValueError: ``bits`` or ``head_dim`` is out of range.
    """
    bits = integer_of(bits, "bits", TEXTBOOK_BITS, what="the textbook's codebooks have")
    return _solved(bits, None if head_dim is None else integer(head_dim, "head_dim", least=SMALLEST_HEAD_DIM))


# Behind the checks: to a cache, True and 1.0 are the key 1.
@cache
def _solved(bits: int, head_dim: int | None) -> Codebook:
    density = coordinate_density(head_dim)
    known = shipped().get("gaussian" if head_dim is None else str(head_dim))
    levels = mirrored(solve(bits, density).tolist() if known is None else known[str(bits)])
    return Codebook(levels, mean_squared_error(levels, density))
