"""Hadamard transform of one or a few vectors held by one program: a product with a matrix of +-1, for any order.

The matrix is small enough to stay in the second-level cache, and a product needs no exchange between threads but one
reduction, unlike the butterflies of the fast transform.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .rotate import power_of_two, split


@triton.jit
def load_rotation(matrix, D: tl.constexpr):
    """fp16 ``[D, D]`` padded with zeros to powers of two; issue it early, its latency is the longest of all."""
    PADDED: tl.constexpr = triton.next_power_of_2(D)
    row = tl.arange(0, PADDED)[:, None]
    column = tl.arange(0, PADDED)[None, :]
    if PADDED == D:
        return tl.load(matrix + row * D + column)
    else:
        return tl.load(matrix + row * D + column, mask=(row < D) & (column < D), other=0.0)


@triton.jit
def rotate_vector(x, matrix, D: tl.constexpr):
    """``matrix @ x / sqrt(D)`` for float32 ``x`` padded with zeros, ``matrix`` as :func:`load_rotation` gives it."""
    return tl.sum(tl.expand_dims(x, 0) * matrix.to(tl.float32), 1) * (1.0 / tl.sqrt(D * 1.0))


@triton.jit
def rotate_rows(rows, matrix, D: tl.constexpr):
    """:func:`rotate_vector` of each row of float32 ``[rows, padded D]``: one, or 16 and more on the tensor cores."""
    if rows.shape[0] == 1:
        return tl.expand_dims(rotate_vector(tl.reshape(rows, (rows.shape[1],)), matrix, D), 0)
    else:
        multiplier = power_of_two(rows)
        high, low = split(rows * multiplier[:, None])
        columns = tl.trans(matrix)
        return tl.dot(high, columns, tl.dot(low, columns)) / (multiplier * tl.sqrt(D * 1.0))[:, None]
