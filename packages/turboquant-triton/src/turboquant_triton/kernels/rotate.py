"""Randomized Hadamard rotation of a tile of rows on the tensor cores, to single precision.

The matrix is +-1, so products with fp16 inputs are exact and only their float32 sum is rounded. A row is first scaled
by a power of two that brings its largest coordinate to 2**14 .. 2**15. A 16-bit input then is one fp16 number; a
float32 one is the sum of two, to 2**-23. Any order costs the same: the matrix is padded with zeros to a power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

MAGNITUDE_MASK = tl.constexpr(0x7FFFFFFF)
# Biased exponents of x and of its multiplier add up to 127 + 127 + 14.
EXPONENT_SUM = tl.constexpr(268)
# The inverse of the multiplier is a normal number too.
LARGEST_EXPONENT = tl.constexpr(253)


@triton.jit
def load_matrix(matrix, signs, first, D: tl.constexpr, WIDTH: tl.constexpr):
    """``diag(signs)`` times the transposed operand, coordinates ``first`` on: fp16 ``[WIDTH, positions]``."""
    PADDED: tl.constexpr = triton.next_power_of_2(D)
    coordinate = first + tl.arange(0, WIDTH)
    position = tl.arange(0, PADDED)
    sign = tl.load(signs + coordinate, mask=coordinate < D, other=0.0).to(tl.float16)
    return tl.load(matrix + position[None, :] * PADDED + coordinate[:, None]) * sign[:, None]


@triton.jit
def whole_matrix(matrix, signs, D: tl.constexpr, WIDTH: tl.constexpr):
    """The operand that :func:`rotate_rows` takes: the loaded matrix when it is used whole, else its address."""
    if triton.next_power_of_2(D) == WIDTH:
        return load_matrix(matrix, signs, 0, D, WIDTH)
    else:
        return matrix


@triton.jit
def load_coordinates(row, center_row, valid, first, D: tl.constexpr, WIDTH: tl.constexpr, HAS_CENTER: tl.constexpr):
    """float32 ``[rows, WIDTH]`` from coordinate ``first`` on, centred; zero where not ``valid`` and in the padding."""
    coordinate = first + tl.arange(0, WIDTH)[None, :]
    mask = valid[:, None]
    if triton.next_power_of_2(D) != D:
        mask = mask & (coordinate < D)
    x = tl.load(row[:, None] + coordinate, mask=mask, other=0.0).to(tl.float32)
    if HAS_CENTER:
        x -= tl.load(center_row[:, None] + coordinate, mask=mask, other=0.0)
    return x


@triton.jit
def power_of_two(x):
    """Exact multipliers that bring the largest of each row to 2**14 .. 2**15 (one with an infinity or NaN stays so)."""
    largest = tl.max(x.to(tl.int32, bitcast=True) & MAGNITUDE_MASK, 1)
    exponent = tl.minimum(-(largest >> 23) + EXPONENT_SUM, LARGEST_EXPONENT)
    return (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def split(x):
    """Two fp16 tensors whose sum is float32 ``x`` to 2**-23, for ``|x|`` below 2**15 and not far below 1."""
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


@triton.jit
def rotate_rows(
    row,
    center_row,
    valid,
    signs,
    operand,
    D: tl.constexpr,
    HAS_CENTER: tl.constexpr,
    SPLIT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Rotate the vectors at ``row`` (pointers).

    Returns float32 ``[rows, positions]``, ``H diag(signs) x`` in the operand's order of positions times a power of two
    of each row, and that power. A vector with an infinity or NaN gives infinities or NaN.
    """
    PADDED: tl.constexpr = triton.next_power_of_2(D)
    x = load_coordinates(row, center_row, valid, 0, D, PADDED, HAS_CENTER)
    multiplier = power_of_two(x)
    total = tl.zeros((x.shape[0], PADDED), tl.float32)
    for first in tl.static_range(0, PADDED, WIDTH):
        if WIDTH == PADDED:
            part = x
            columns = operand
        else:
            part = load_coordinates(row, center_row, valid, first, D, WIDTH, HAS_CENTER)
            columns = load_matrix(operand, signs, first, D, WIDTH)
        part *= multiplier[:, None]
        if SPLIT:
            high, low = split(part)
            total = tl.dot(low, columns, total)
            total = tl.dot(high, columns, total)
        else:
            total = tl.dot(part.to(tl.float16), columns, total)
    return total, multiplier
