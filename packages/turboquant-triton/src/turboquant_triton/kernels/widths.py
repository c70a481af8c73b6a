"""Code widths of a row: one, or with fractional bits one for each half of the coordinates.

A kernel's ``BITS`` is the width, 2, 3 or 4; two widths are ``100 * first + second``: 302 for 2.5 bits, 403 for 3.5. The
halves are rows of ``D / 2`` coordinates, one after the other, with one scale.
"""

from __future__ import annotations

import triton


@triton.constexpr_function
def is_mixed(bits):
    """Whether the row has two widths."""
    return bits > 100


@triton.constexpr_function
def first_width(bits):
    """Width of the first half of the coordinates."""
    return bits // 100


@triton.constexpr_function
def second_width(bits):
    """Width of the second half of the coordinates."""
    return bits % 100


@triton.constexpr_function
def row_bytes(head_dim, bits):
    """Bytes of a code row."""
    return head_dim * (bits // 100 + bits % 100) // 16 if bits > 100 else head_dim * bits // 8


@triton.constexpr_function
def unit_bytes(bits):
    """Bytes of the integers by which a row is addressed: what its parts and its start are multiples of."""
    return 4 if bits in (2, 4) else 2


@triton.constexpr_function
def code_fields(bits):
    """Coordinates that one 32-bit word (two at 3 bits) holds."""
    return 8 if bits == 4 else 16


@triton.constexpr_function
def lowest_word(bits, int8):
    """Word of a vector whose codes are all 0."""
    return -1 if bits == 4 and int8 else 0
