"""Orders, exact orthogonality, and matrices that never change."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from turboquant_core import LayoutError
from turboquant_core.hadamard import factor, hadamard_matrix, supported_order

NAMED = [12, 20, 28, 36, 44, 52, 60, 64, 80, 96, 100, 112, 128, 160, 192, 224, 256, 512, 576]
SUPPORTED = [order for order in range(1, 1025) if supported_order(order)]
# Neither order - 1 nor order / 2 - 1 is a prime power of the right residue, for the order and its halves.
UNSUPPORTED = [92, 116, 156, 172, 184, 188, 232, 236, 260, 268, 292]
EXTENSION_FIELDS = {52: 25, 100: 49, 244: 243, 340: 169, 344: 343, 580: 289, 724: 361}


@pytest.mark.parametrize("order", [n for n in SUPPORTED if n <= 300] + [340, 344, 512, 576, 580, 680, 688, 724, 1024])
def test_rows_are_orthogonal(order: int) -> None:
    matrix = hadamard_matrix(order)
    assert matrix.dtype == np.int8
    assert matrix.shape == (order, order)
    assert set(np.unique(matrix)) <= {-1, 1}
    # Every partial sum is an integer below 2**24, so float32 is exact.
    wide = matrix.astype(np.float32)
    assert np.array_equal(wide @ wide.T, order * np.eye(order, dtype=np.float32))


def test_supported_orders() -> None:
    assert set(NAMED) <= set(SUPPORTED)
    assert [n for n in range(4, 301, 4) if n not in SUPPORTED] == UNSUPPORTED
    assert all(n in (1, 2) or n % 4 == 0 for n in SUPPORTED)


def test_multiples_of_eight_without_a_matrix() -> None:
    assert [n for n in range(8, 1025, 8) if not supported_order(n)] == [
        *(184, 232, 376, 472, 520, 536, 584, 712, 808, 856, 872, 904, 944, 952, 1016)
    ]


@pytest.mark.parametrize("order", EXTENSION_FIELDS)
def test_extension_fields_add_orders(order: int) -> None:
    assert factor(order) == (order, 1)
    assert EXTENSION_FIELDS[order] in (order - 1, order // 2 - 1)


@pytest.mark.parametrize(
    ("order", "expected"),
    [(1, (1, 1)), (64, (1, 64)), (20, (20, 1)), (28, (28, 1)), (80, (20, 4)), (104, (104, 1)), (576, (36, 16))],
)
def test_smallest_base_over_a_prime_field_comes_first(order: int, expected: tuple[int, int]) -> None:
    """104 = 2 * 52 has a base over the field of 25 elements, but its rotation over 103 elements is older."""
    assert factor(order) == expected


def test_base_times_sylvester() -> None:
    sylvester = np.array([[1, 1], [1, -1]])
    assert np.array_equal(hadamard_matrix(2), sylvester)
    assert np.array_equal(hadamard_matrix(80), np.kron(hadamard_matrix(20), np.kron(sylvester, sylvester)))


def test_signs_of_the_first_row_and_column() -> None:
    paley_one, paley_two = hadamard_matrix(12), hadamard_matrix(36)
    assert (hadamard_matrix(64)[0] == 1).all()
    assert (hadamard_matrix(64)[:, 0] == 1).all()
    assert (paley_one[0] == 1).all()
    assert (paley_one[1:, 0] == -1).all()
    assert paley_two[0].tolist() == [1, -1] + [1] * 34


def test_paley_of_eleven() -> None:
    """Residues modulo 11 are 1 3 4 5 9; row 1 holds chi(0 - j), with +1 on the diagonal."""
    residues = {1, 3, 4, 5, 9}
    row = [-1] + [1 if j == 0 or (-j) % 11 in residues else -1 for j in range(11)]
    assert hadamard_matrix(12)[1].tolist() == row


EXTENSION_FIELD_ORDERS = [344, 680, 688]
PRIME_FIELD_ORDERS = [n for n in SUPPORTED if n % 8 == 0 and n not in EXTENSION_FIELD_ORDERS]


@pytest.mark.parametrize(
    ("orders", "expected"),
    [
        (PRIME_FIELD_ORDERS, "9f694ccfd15accba04e362c614c50a16b7adeb3e880b332678003757e28aca88"),
        (EXTENSION_FIELD_ORDERS, "6aaf222a1948ea217469a8ef603f6378b91cf7e56b19dcbdafa25646133e36c1"),
    ],
    ids=["prime fields", "extension fields"],
)
def test_matrices_of_layout_version_1(orders: list[int], expected: str) -> None:
    """The bytes of every rotation depend on these matrices, which no new construction may replace."""
    digest = hashlib.sha256()
    for order in orders:
        digest.update(hadamard_matrix(order).tobytes())
    assert digest.hexdigest() == expected


def test_matrix_is_read_only_and_cached() -> None:
    matrix = hadamard_matrix(12)
    assert matrix is hadamard_matrix(12)
    with pytest.raises(ValueError, match="read-only"):
        matrix[0, 0] = 0


@pytest.mark.parametrize(
    ("order", "nearest"),
    [(92, "88 or 96"), (116, "112 or 120"), (172, "168 or 176"), (184, "180 or 192"), (6, "4 or 8")],
)
def test_an_unknown_order_names_the_nearest(order: int, nearest: str) -> None:
    with pytest.raises(LayoutError, match=rf"head_dim is {order}; .* here {nearest}: .* append zeros"):
        factor(order)


@pytest.mark.parametrize(("order", "nearest"), [(0, "1"), (-8, "1"), (1028, "1024")])
def test_an_order_out_of_range_names_the_nearest(order: int, nearest: str) -> None:
    assert not supported_order(order)
    with pytest.raises(LayoutError, match=rf"head_dim is {order}; .* up to 1024, here {nearest}:"):
        hadamard_matrix(order)
