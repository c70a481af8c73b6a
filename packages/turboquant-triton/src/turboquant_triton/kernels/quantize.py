"""Nearest level of each coordinate, and the scale of each vector (:mod:`turboquant_core.scale`)."""

from __future__ import annotations

import triton
import triton.language as tl

from .cells import CELLS, boundaries_below, boundary_reached, cell_of, cell_start, look_up, pair, unpair

LARGEST_FP16 = tl.constexpr(65504.0)
INDEX_MASK = tl.constexpr(7)


@triton.jit
def load_bounds(boundaries, BITS: tl.constexpr):
    """Positive boundaries of a codebook that is symmetric about 0: 1 or 3 scalars, at 4 bits float32 ``[CELLS]``.

    The last is the boundary in each cell, infinity where there is none.
    """
    first = boundaries + (1 << (BITS - 1))
    if BITS == 2:
        return (tl.load(first),)
    elif BITS == 3:
        return tl.load(first), tl.load(first + 1), tl.load(first + 2)
    else:
        cell = tl.arange(0, CELLS)
        below = boundaries_below(first, cell_start(cell, 2), BITS)
        inside = boundaries_below(first, cell_start(cell + 1, 2), BITS) > below
        return tl.load(first + below, mask=inside, other=float("inf"))


@triton.jit
def load_level(levels, index, BITS: tl.constexpr):
    """Positive level number ``index`` whose last three mantissa bits are the index: one selection gives both."""
    level = tl.load(levels + (1 << (BITS - 1)) + index)
    return ((level.to(tl.int32, bitcast=True) & ~INDEX_MASK) | index).to(tl.float32, bitcast=True)


@triton.jit
def load_levels(levels, boundaries, BITS: tl.constexpr):
    """Positive levels as :func:`load_level` gives them: 2 or 4 scalars, at 4 bits float32 ``[2 * CELLS]``.

    The last are the levels below the boundary of each cell, and those above it.
    """
    if BITS == 2:
        return load_level(levels, 0, BITS), load_level(levels, 1, BITS)
    elif BITS == 3:
        return (
            load_level(levels, 0, BITS),
            load_level(levels, 1, BITS),
            load_level(levels, 2, BITS),
            load_level(levels, 3, BITS),
        )
    else:
        entry = tl.arange(0, 2 * CELLS)
        below = boundaries_below(boundaries + (1 << (BITS - 1)), cell_start(entry % CELLS, 2), BITS)
        return load_level(levels, tl.minimum(below + entry // CELLS, INDEX_MASK), BITS)


@triton.jit
def nearest(magnitude, bounds, levels, BITS: tl.constexpr):
    """Nearest positive level to ``magnitude``, its index in the last three mantissa bits.

    A coordinate within rounding of a boundary may take either side.
    """
    if BITS == 2:
        return tl.where(magnitude > bounds[0], levels[1], levels[0])
    elif BITS == 3:
        high3 = magnitude > bounds[1]
        low3 = magnitude > tl.where(high3, bounds[2], bounds[0])
        return tl.where(low3, tl.where(high3, levels[3], levels[1]), tl.where(high3, levels[2], levels[0]))
    else:
        # Two look-ups take fewer instructions than a tree of seven comparisons.
        cell = cell_of(magnitude, 2)
        above = magnitude > look_up(bounds, cell)
        return look_up(levels, cell + tl.where(above, CELLS, 0))


@triton.jit
def level_index(level):
    """Index of a level that :func:`nearest` gave."""
    return level.to(tl.int32, bitcast=True) & INDEX_MASK


@triton.jit
def load_indices(boundaries, BITS: tl.constexpr):
    """What :func:`nearest_index` takes: positive boundaries as :func:`load_bounds` gives them, at 4 bits int64 entries.

    The last are the boundary in each cell and its index (:func:`pair`).
    """
    if BITS == 4:
        index = boundary_reached(boundaries + (1 << (BITS - 1)), 1.0, BITS)
        return pair(tl.load(boundaries + (1 << (BITS - 1)) + index), index)
    else:
        return load_bounds(boundaries, BITS)


@triton.jit
def nearest_index(magnitude, bounds, BITS: tl.constexpr):
    """Index of the positive level nearest to ``magnitude``; int32."""
    if BITS == 2:
        return (magnitude > bounds[0]).to(tl.int32)
    elif BITS == 3:
        high3 = magnitude > bounds[1]
        low3 = magnitude > tl.where(high3, bounds[2], bounds[0])
        return tl.where(high3, 2, 0) | low3.to(tl.int32)
    else:
        boundary, index = unpair(look_up(bounds, cell_of(magnitude, 3)))
        return index + (magnitude > boundary.to(tl.float32, bitcast=True)).to(tl.int32)


@triton.jit
def vector_scale(rms, inner, power, RULE: tl.constexpr, D: tl.constexpr):
    """Scale of each row whose coordinates have root mean square ``rms``.

    ``inner`` is ``<u, l>`` and ``power`` ``|l|^2`` with the levels ``l`` of the coordinates ``u`` over ``rms``.
    """
    if RULE == "norm":
        return rms
    elif RULE == "renorm":
        return rms * tl.rsqrt(power / D)
    elif RULE == "unbiased" or RULE == "searched":
        return rms * (tl.where(inner > 0, D * 1.0, 0.0) / tl.where(inner > 0, inner, 1.0))
    else:
        return rms * (inner / power)


@triton.jit
def stored_scale(scale, finite):
    """Scale as fp16, saturated at 65504; NaN for a vector that is not ``finite``."""
    return tl.where(finite, tl.minimum(scale, LARGEST_FP16), float("nan")).to(tl.float16)
