"""Nearest level of each coordinate, and the scale of each vector (:mod:`turboquant_core.scale`)."""

from __future__ import annotations

import triton
import triton.language as tl

LARGEST_FP16 = tl.constexpr(65504.0)


@triton.jit
def load_upper(table, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """``COUNT`` (1 to 8) float32 scalars from ``table + FIRST`` on; the tuple is filled up to eight."""
    a = tl.load(table + FIRST)
    b = tl.load(table + FIRST + min(1, COUNT - 1))
    c = tl.load(table + FIRST + min(2, COUNT - 1))
    d = tl.load(table + FIRST + min(3, COUNT - 1))
    e = tl.load(table + FIRST + min(4, COUNT - 1))
    f = tl.load(table + FIRST + min(5, COUNT - 1))
    g = tl.load(table + FIRST + min(6, COUNT - 1))
    h = tl.load(table + FIRST + min(7, COUNT - 1))
    return a, b, c, d, e, f, g, h


@triton.jit
def load_codebook(boundaries, levels, BITS: tl.constexpr):
    """Positive boundaries and levels of a codebook that is symmetric about 0."""
    HALF: tl.constexpr = 1 << (BITS - 1)
    return load_upper(boundaries, HALF, HALF - 1), load_upper(levels, HALF, HALF)


@triton.jit
def choose4(second, first, table):
    """``table[2 * second + first]`` of four scalars."""
    return tl.where(first, tl.where(second, table[3], table[1]), tl.where(second, table[2], table[0]))


@triton.jit
def nearest(magnitude, codebook, BITS: tl.constexpr):
    """Index of the nearest positive level to ``magnitude`` (float, not negative) and that level."""
    bounds, levels = codebook
    if BITS == 2:
        up = magnitude > bounds[0]
        return up.to(tl.int32), tl.where(up, levels[1], levels[0])
    elif BITS == 3:
        high3 = magnitude > bounds[1]
        low3 = magnitude > tl.where(high3, bounds[2], bounds[0])
        return tl.where(high3, 2, 0) + low3.to(tl.int32), choose4(high3, low3, levels)
    else:
        high = magnitude > bounds[3]
        middle = magnitude > tl.where(high, bounds[5], bounds[1])
        low = magnitude > tl.where(
            middle, tl.where(high, bounds[6], bounds[2]), tl.where(high, bounds[4], bounds[0])
        )
        index = tl.where(high, 4, 0) + tl.where(middle, 2, 0) + low.to(tl.int32)
        even = choose4(high, middle, (levels[0], levels[2], levels[4], levels[6]))
        odd = choose4(high, middle, (levels[1], levels[3], levels[5], levels[7]))
        return index, tl.where(low, odd, even)


@triton.jit
def quantize(rotated, codebook, BITS: tl.constexpr, RULE: tl.constexpr, D: tl.constexpr, UNITS: tl.constexpr):
    """Quantize float32 ``[rows, positions]``; padding, the positions whose unit is not below ``UNITS``, holds zeros.

    Returns the index of the level's magnitude (int32), where the level is negative, and the scale of each row in the
    units of ``rotated``. A coordinate within rounding of a boundary may take either side.
    """
    PADDED: tl.constexpr = triton.next_power_of_2(D)
    energy = tl.sum(rotated * rotated, 1)
    present = tl.where(energy > 0, energy, 1.0)
    magnitude = tl.abs(rotated)
    index, level = nearest(magnitude * tl.rsqrt(present / D)[:, None], codebook, BITS)
    negative = (rotated > 0) == 0
    if RULE == "norm":
        return index, negative, tl.sqrt_rn(energy / D)
    elif RULE == "unbiased":
        inner = tl.sum(magnitude * level, 1)
        return index, negative, tl.div_rn(energy, tl.where(inner > 0, inner, 1.0))
    else:
        if PADDED != D:
            unit = tl.arange(0, PADDED) % triton.next_power_of_2(UNITS)
            level = tl.where((unit < UNITS)[None, :], level, 0.0)
        power = tl.sum(level * level, 1)
        if RULE == "renorm":
            return index, negative, tl.sqrt_rn(tl.div_rn(energy, power))
        else:
            return index, negative, tl.div_rn(tl.sum(magnitude * level, 1), power)


@triton.jit
def stored_scale(scale, finite):
    """Scale as fp16, saturated at 65504; NaN for a vector that is not ``finite``."""
    return tl.where(finite, tl.minimum(scale, LARGEST_FP16), float("nan")).to(tl.float16)
