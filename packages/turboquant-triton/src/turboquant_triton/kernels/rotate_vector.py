"""Hadamard transform of one vector held by one program: a product with a matrix of +-1, for any order."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rotate_vector(x, hadamard, D: tl.constexpr, TRANSPOSE: tl.constexpr):
    """``H x / sqrt(D)`` (``H^T x / sqrt(D)``) for float32 ``x`` padded with zeros to a power of two.

    ``hadamard`` is int8 ``[D, D]``. The matrix is small enough to stay in the second-level cache, and a product needs
    no exchange between threads but one reduction, unlike the butterflies of the fast transform.
    """
    PADDED: tl.constexpr = triton.next_power_of_2(D)
    row = tl.arange(0, PADDED)[:, None]
    column = tl.arange(0, PADDED)[None, :]
    mask = (row < D) & (column < D)
    if TRANSPOSE:
        # Summing over rows keeps the loads contiguous.
        by_row = tl.sum(
            tl.expand_dims(x, 1) * tl.load(hadamard + row * D + column, mask=mask, other=0).to(tl.float32), 0
        )
        return by_row * (1.0 / tl.sqrt(D * 1.0))
    else:
        by_column = tl.sum(
            tl.expand_dims(x, 0) * tl.load(hadamard + row * D + column, mask=mask, other=0).to(tl.float32), 1
        )
        return by_column * (1.0 / tl.sqrt(D * 1.0))
