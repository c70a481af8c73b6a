"""Nearest level of each coordinate, and the scale of each vector (:mod:`turboquant_core.scale`)."""

from __future__ import annotations

import triton
import triton.language as tl

LARGEST_FP16 = tl.constexpr(65504.0)
INDEX_MASK = tl.constexpr(7)


@triton.jit
def load_bounds(boundaries, BITS: tl.constexpr):
    """Positive boundaries (1, 3 or 7 scalars) of a codebook that is symmetric about 0."""
    first = boundaries + (1 << (BITS - 1))
    if BITS == 2:
        return (tl.load(first),)
    elif BITS == 3:
        return tl.load(first), tl.load(first + 1), tl.load(first + 2)
    else:
        return (
            tl.load(first),
            tl.load(first + 1),
            tl.load(first + 2),
            tl.load(first + 3),
            tl.load(first + 4),
            tl.load(first + 5),
            tl.load(first + 6),
        )


@triton.jit
def load_level(levels, index, BITS: tl.constexpr):
    """Positive level number ``index`` whose last three mantissa bits are the index: one selection gives both."""
    level = tl.load(levels + (1 << (BITS - 1)) + index)
    return ((level.to(tl.int32, bitcast=True) & ~INDEX_MASK) | index).to(tl.float32, bitcast=True)


@triton.jit
def load_levels(levels, BITS: tl.constexpr):
    """Positive levels (2, 4 or 8 scalars), as :func:`load_level` gives them."""
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
        return (
            load_level(levels, 0, BITS),
            load_level(levels, 1, BITS),
            load_level(levels, 2, BITS),
            load_level(levels, 3, BITS),
            load_level(levels, 4, BITS),
            load_level(levels, 5, BITS),
            load_level(levels, 6, BITS),
            load_level(levels, 7, BITS),
        )


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
        high = magnitude > bounds[3]
        middle = magnitude > tl.where(high, bounds[5], bounds[1])
        above = tl.where(high, bounds[6], bounds[2])
        below = tl.where(high, bounds[4], bounds[0])
        low = magnitude > tl.where(middle, above, below)
        odd = tl.where(middle, tl.where(high, levels[7], levels[3]), tl.where(high, levels[5], levels[1]))
        even = tl.where(middle, tl.where(high, levels[6], levels[2]), tl.where(high, levels[4], levels[0]))
        return tl.where(low, odd, even)


@triton.jit
def level_index(level):
    """Index of a level that :func:`nearest` gave."""
    return level.to(tl.int32, bitcast=True) & INDEX_MASK


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
