"""Hadamard matrices: Paley's two constructions over finite fields, times Sylvester's for a power of two.

Kronecker products of two Paley matrices reach no further order up to 1024.
"""

from __future__ import annotations

from functools import cache
from itertools import islice, product
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .errors import OTHER_HEAD_DIM, LayoutError

if TYPE_CHECKING:
    from collections.abc import Iterator

Int8Matrix = NDArray[np.int8]
_Element: TypeAlias = tuple[int, ...]
_Construction: TypeAlias = Literal["trivial", "paley one", "paley two"]
_LARGEST = 1024


@cache
def _prime_power(q: int) -> tuple[int, int] | None:
    """``(p, k)`` with ``q = p**k`` and ``p`` prime, or None."""
    if q < 2:
        return None
    p = next((n for n in range(2, int(q**0.5) + 1) if q % n == 0), q)
    k = 1
    while p**k < q:
        k += 1
    return (p, k) if p**k == q else None


def _powers(generator: _Element, p: int) -> Iterator[_Element]:
    """``1, x, x^2, ...`` until 1 returns, in the polynomials over ``p`` modulo ``x^k - generator``.

    Coefficients are in ascending order. ``generator[0]`` is not 0, so multiplication by ``x`` is invertible and 1
    returns.
    """
    one = element = (1,) + (0,) * (len(generator) - 1)
    while True:
        yield element
        carry = element[-1]
        element = tuple((low + carry * c) % p for low, c in zip((0, *element[:-1]), generator, strict=True))
        if element == one:
            return


def _field_powers(p: int, k: int) -> list[_Element]:
    """Every nonzero element of the field of ``p**k`` elements, as the powers of ``x``.

    The modulus is the first whose ``x`` has ``p**k - 1`` different powers: then every nonzero polynomial of degree
    below ``k`` is a power of ``x``, so it has an inverse and the polynomials are a field.
    """
    for generator in product(range(p), repeat=k):
        if generator[0]:
            powers = list(islice(_powers(generator, p), p**k))
            if len(powers) == p**k - 1:
                return powers
    raise AssertionError(f"no primitive polynomial of degree {k} over {p}")


def _jacobsthal(q: int) -> NDArray[np.int64]:
    """``Q[i, j] = chi(a_i - a_j)`` with the quadratic character of the field of ``q`` elements.

    Element ``a_i`` has the base-``p`` digits of ``i`` as coefficients.
    """
    field = _prime_power(q)
    if field is None:
        raise AssertionError(f"{q} is not a prime power")
    p, k = field
    place = p ** np.arange(k)
    chi = np.zeros(q, dtype=np.int64)
    # The squares are the even powers of a generator.
    chi[np.array(_field_powers(p, k)) @ place] = np.resize([1, -1], q - 1)
    digits = np.arange(q)[:, None] // place % p
    return np.asarray(chi[(digits[:, None] - digits[None, :]) % p @ place])


def _paley_one(q: int) -> NDArray[np.int64]:
    """Order ``q + 1`` for a prime power ``q = 3 mod 4`` (Paley 1933, construction I)."""
    matrix = np.ones((q + 1, q + 1), dtype=np.int64)
    matrix[1:, 1:] = _jacobsthal(q) + np.eye(q, dtype=np.int64)
    matrix[1:, 0] = -1
    return matrix


def _paley_two(q: int) -> NDArray[np.int64]:
    """Order ``2 (q + 1)`` for a prime power ``q = 1 mod 4`` (Paley 1933, construction II)."""
    conference = np.ones((q + 1, q + 1), dtype=np.int64)
    conference[0, 0] = 0
    conference[1:, 1:] = _jacobsthal(q)
    diagonal = np.eye(q + 1, dtype=np.int64)
    return np.kron(conference, np.array([[1, 1], [1, -1]])) + np.kron(diagonal, np.array([[1, -1], [-1, -1]]))


def _checked(matrix: NDArray[np.int64]) -> Int8Matrix:
    order = matrix.shape[0]
    # Sums of at most 1024 signs are exact in float32, whose product is the fast one.
    signs = matrix.astype(np.float32)
    if not np.array_equal(signs @ signs.T, order * np.eye(order)):
        raise AssertionError(f"construction of order {order} is not a Hadamard matrix")
    return matrix.astype(np.int8)


def _construction(order: int, largest_degree: int) -> tuple[_Construction, int] | None:
    """How to build a base matrix of ``order`` and over which field, or None.

    ``largest_degree`` bounds the degree of the field over its prime field.
    """
    if order == 1:
        return "trivial", 1
    if order % 4:
        return None
    one, two = order - 1, order // 2 - 1
    if _has_field(one, largest_degree):
        return "paley one", one
    if two % 4 == 1 and _has_field(two, largest_degree):
        return "paley two", two
    return None


def _has_field(q: int, largest_degree: int) -> bool:
    field = _prime_power(q)
    return field is not None and field[1] <= largest_degree


@cache
def _plan(order: int) -> tuple[int, _Construction, int] | None:
    """Base order, construction and field of ``order``, or None.

    Prime fields come first for every split: the order of search decides the bytes of a rotation, and layout version
    1 fixed them before fields of higher degree were added.
    """
    if not 0 < order <= _LARGEST:
        return None
    splits = [order >> shift for shift in reversed(range(_LARGEST.bit_length())) if order % (1 << shift) == 0]
    for largest_degree in (1, _LARGEST.bit_length()):
        for base_order in splits:
            found = _construction(base_order, largest_degree)
            if found is not None:
                return base_order, *found
    return None


def supported_order(order: int) -> bool:
    """Whether :func:`hadamard_matrix` knows a matrix of ``order``."""
    return _plan(order) is not None


def _known_plan(order: int) -> tuple[int, _Construction, int]:
    plan = _plan(order)
    if plan is None:
        below = next(filter(supported_order, range(min(order, _LARGEST), 0, -1)), None)
        above = next(filter(supported_order, range(max(order, 1), _LARGEST + 1)), None)
        near = [str(other) for other in (below, above) if other is not None]
        raise LayoutError(
            f"head_dim is {order}; the rotation needs an order with a known Hadamard matrix up to {_LARGEST}, "
            f"here {' or '.join(near)}: {OTHER_HEAD_DIM}"
        )
    return plan


def factor(order: int) -> tuple[int, int]:
    """Split ``order`` into ``(base order, power of two)``: the smallest base over a prime field, else over any field.

    Raises:
        LayoutError: no Hadamard matrix of ``order`` is known here; names the nearest orders that are.
    """
    base_order = _known_plan(order)[0]
    return base_order, order // base_order


@cache
def hadamard_matrix(order: int) -> Int8Matrix:
    """A Hadamard matrix, int8 ``[order, order]`` of +-1, read-only: ``kron(base, sylvester)``.

    Row 0 is +1 throughout, except that Paley's second construction has -1 at the second entry of its base. Column 0 is
    not normalised: the signs of rows and columns are part of the layout.

    Raises:
        LayoutError: see :func:`factor`.
    """
    base_order, construction, q = _known_plan(order)
    power = order // base_order
    if construction == "trivial":
        matrix = np.ones((1, 1), dtype=np.int8)
    else:
        matrix = _checked(_paley_one(q) if construction == "paley one" else _paley_two(q))
    while power > 1:
        matrix = np.kron(matrix, np.array([[1, 1], [1, -1]], dtype=np.int8))
        power //= 2
    matrix.setflags(write=False)
    return matrix
