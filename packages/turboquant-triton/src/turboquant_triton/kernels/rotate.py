"""Randomized Hadamard rotation of a tile of rows on the tensor cores, to single precision.

The matrix is +-1, so products with fp16 inputs are exact and only their float32 sum is rounded. A row is first scaled
by a power of two that brings its largest coordinate to 2**14 .. 2**15. A 16-bit input then is one fp16 number; a
float32 one is the sum of two, to 2**-23. Any order costs the same: the matrix is padded with zeros to a power of two.

A tile is rotated in parts, a few positions at a time: a whole one would not leave registers for the work on it.
"""

from __future__ import annotations

import triton
import triton.language as tl

EXPONENT_MASK = tl.constexpr(255)
# Biased exponents of x and of its multiplier add up to 127 + 127 + 14.
EXPONENT_SUM = tl.constexpr(268)
# The inverse of the multiplier is a normal number too.
LARGEST_EXPONENT = tl.constexpr(253)


@triton.jit
def load_vectors(row, center_row, valid, D: tl.constexpr, HAS_CENTER: tl.constexpr):
    """float32 ``[rows, padded D]`` at ``row`` (pointers), centred; zero where not ``valid`` and in the padding."""
    coordinate = tl.arange(0, triton.next_power_of_2(D))[None, :]
    mask = valid[:, None]
    if triton.next_power_of_2(D) != D:
        mask = mask & (coordinate < D)
    x = tl.load(row[:, None] + coordinate, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    if HAS_CENTER:
        x -= tl.load(center_row[:, None] + coordinate, mask=mask, other=0.0)
    return x


@triton.jit
def power_of_two(x):
    """Exact multipliers that bring the largest of each row to 2**14 .. 2**15 (one with an infinity or NaN stays so)."""
    largest = tl.max(tl.abs(x), 1).to(tl.int32, bitcast=True)
    exponent = tl.minimum(-((largest >> 23) & EXPONENT_MASK) + EXPONENT_SUM, LARGEST_EXPONENT)
    return (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def split(x):
    """Two fp16 tensors whose sum is float32 ``x`` to 2**-23, for ``|x|`` below 2**15 and not far below 1."""
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


@triton.jit
def signed_halves(x, signs, D: tl.constexpr, SPLIT: tl.constexpr):
    """``diag(signs) x`` as the fp16 operands of :func:`rotate_part`, which reads the second only with ``SPLIT``."""
    coordinate = tl.arange(0, triton.next_power_of_2(D))
    sign = tl.load(signs + coordinate, mask=coordinate < D, other=0.0).to(tl.float16)[None, :]
    if SPLIT:
        high, low = split(x)
        return high * sign, low * sign
    else:
        only = x.to(tl.float16) * sign
        return only, only


@triton.jit
def rotate_part(halves, matrix, first, D: tl.constexpr, SPLIT: tl.constexpr, COLUMNS: tl.constexpr):
    """float32 ``[rows, COLUMNS]``: ``H diag(signs) x`` at positions ``first .. first + COLUMNS - 1`` of the operand."""
    PADDED: tl.constexpr = triton.next_power_of_2(D)
    coordinate = tl.arange(0, PADDED)
    position = first + tl.arange(0, COLUMNS)
    columns = tl.load(matrix + position[None, :] * PADDED + coordinate[:, None], eviction_policy="evict_last")
    if SPLIT:
        return tl.dot(halves[0], columns, tl.dot(halves[1], columns))
    else:
        return tl.dot(halves[0], columns)
