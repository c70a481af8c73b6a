"""Hadamard matrices: Sylvester's for powers of two, Paley's for the rest, and their Kronecker products."""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from .errors import LayoutError

Int8Matrix = NDArray[np.int8]
_LARGEST = 1024


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % p for p in range(2, int(n**0.5) + 1))


def _jacobsthal(q: int) -> NDArray[np.int64]:
    """``Q[i, j] = chi(i - j)`` with the quadratic character of the prime field of ``q`` elements."""
    chi = np.full(q, -1)
    chi[[i * i % q for i in range(q)]] = 1
    chi[0] = 0
    index = np.arange(q)
    return np.asarray(chi[(index[:, None] - index[None, :]) % q])


def _paley_one(q: int) -> Int8Matrix:
    """Order ``q + 1`` for a prime ``q = 3 mod 4`` (Paley 1933, construction I)."""
    matrix = np.ones((q + 1, q + 1), dtype=np.int64)
    matrix[1:, 1:] = _jacobsthal(q) + np.eye(q, dtype=np.int64)
    matrix[1:, 0] = -1
    return _checked(matrix)


def _paley_two(q: int) -> Int8Matrix:
    """Order ``2 (q + 1)`` for a prime ``q = 1 mod 4`` (Paley 1933, construction II)."""
    conference = np.ones((q + 1, q + 1), dtype=np.int64)
    conference[0, 0] = 0
    conference[1:, 1:] = _jacobsthal(q)
    diagonal = np.eye(q + 1, dtype=np.int64)
    return _checked(np.kron(conference, np.array([[1, 1], [1, -1]])) + np.kron(diagonal, np.array([[1, -1], [-1, -1]])))


def _checked(matrix: NDArray[np.int64]) -> Int8Matrix:
    order = matrix.shape[0]
    if not np.array_equal(matrix @ matrix.T, order * np.eye(order, dtype=np.int64)):
        raise AssertionError(f"construction of order {order} is not a Hadamard matrix")
    return matrix.astype(np.int8)


@cache
def _base(order: int) -> Int8Matrix | None:
    """A Hadamard matrix of ``order`` that is no Kronecker product with Sylvester's, or None."""
    if order == 1:
        return np.ones((1, 1), dtype=np.int8)
    if order % 4 == 0 and _is_prime(order - 1):
        return _paley_one(order - 1)
    half = order // 2 - 1
    if order % 4 == 0 and half % 4 == 1 and _is_prime(half):
        return _paley_two(half)
    return None


@cache
def _factor(order: int) -> tuple[int, int] | None:
    odd, power = order, 1
    while odd % 2 == 0:
        odd, power = odd // 2, power * 2
    while power >= 1:
        if _base(order // power) is not None:
            return order // power, power
        power //= 2
    return None


def supported_order(order: int) -> bool:
    """Whether :func:`hadamard_matrix` knows a matrix of ``order``."""
    return 0 < order <= _LARGEST and _factor(order) is not None


def factor(order: int) -> tuple[int, int]:
    """Split ``order`` into ``(base order, power of two)`` with the smallest base.

    Raises:
        LayoutError: no Hadamard matrix of ``order`` is known here; names the nearest orders that are.
    """
    found = _factor(order) if 0 < order <= _LARGEST else None
    if found is None:
        near = sorted((n for n in range(1, _LARGEST + 1) if supported_order(n)), key=lambda n: abs(n - order))[:2]
        raise LayoutError(
            f"head_dim is {order}; the rotation needs an order with a known Hadamard matrix up to {_LARGEST}, "
            f"the nearest are {' and '.join(map(str, sorted(near)))}: keep this layer uncompressed"
        )
    return found


@cache
def hadamard_matrix(order: int) -> Int8Matrix:
    """A Hadamard matrix, int8 ``[order, order]`` of +-1, read-only: ``kron(base, sylvester)``.

    Raises:
        LayoutError: see :func:`factor`.
    """
    base_order, power = factor(order)
    matrix = _base(base_order)
    if matrix is None:
        raise AssertionError(f"factor({order}) named a base without a matrix")
    while power > 1:
        matrix = np.kron(matrix, np.array([[1, 1], [1, -1]], dtype=np.int8))
        power //= 2
    matrix.setflags(write=False)
    return matrix
