"""Codes of single coordinates of a packed row (table "A code row" of the layout), for kernels that need no speed."""

from __future__ import annotations

import triton
import triton.language as tl

from .widths import first_width, is_mixed, row_bytes, second_width


@triton.jit
def load_nibble(row, nibble, mask):
    """Nibble number ``nibble`` of the rows at ``row`` (pointers to uint8), int32."""
    byte = tl.load(row + nibble // 2, mask=mask, other=0).to(tl.int32) & 255
    return (byte >> (4 * (nibble % 2))) & 15


@triton.jit
def load_codes(row, coordinate, mask, BITS: tl.constexpr, INT8: tl.constexpr, D: tl.constexpr):
    """Codes ``0 .. 2**BITS - 1`` of ``coordinate`` of rows of one width, int32 of the broadcast shape."""
    if BITS == 4 and INT8:
        magnitude = load_nibble(row, coordinate, mask) & 7
        j = coordinate % 8
        sign_nibble = (coordinate // 8) * 8 + tl.where(j < 4, 2 * j + 1, 2 * (j - 4))
        negative = load_nibble(row, sign_nibble, mask) >> 3
        return tl.where(negative == 1, 7 - magnitude, 8 + magnitude)
    elif BITS == 4:
        return load_nibble(row, coordinate, mask)
    elif BITS == 3:
        QUARTER: tl.constexpr = D // 4
        inside = coordinate % QUARTER
        first = load_nibble(row, inside, mask)
        second = load_nibble(row, QUARTER + inside, mask)
        third = load_nibble(row, 2 * QUARTER + inside, mask)
        group = coordinate // QUARTER
        plane = tl.where(group == 0, first, tl.where(group == 1, second, third)) & 7
        return tl.where(group == 3, (first >> 3) | ((second >> 3) << 1) | ((third >> 3) << 2), plane)
    else:
        nibble = load_nibble(row, coordinate % (D // 2), mask)
        return tl.where(coordinate < D // 2, nibble, nibble >> 2) & 3


@triton.jit
def load_entries(row, coordinate, mask, BITS: tl.constexpr, INT8: tl.constexpr, D: tl.constexpr):
    """Entries of the table of levels: the codes, and with two widths those of the second behind those of the first."""
    if is_mixed(BITS):
        FIRST: tl.constexpr = first_width(BITS)
        in_first = coordinate < D // 2
        first = load_codes(row, coordinate, mask & in_first, FIRST, INT8, D // 2)
        second_row = row + row_bytes(D // 2, FIRST)
        rest = tl.where(in_first, 0, coordinate - D // 2)
        second = load_codes(second_row, rest, mask & (in_first == 0), second_width(BITS), INT8, D // 2)
        return tl.where(in_first, first, second + (1 << FIRST))
    else:
        return load_codes(row, coordinate, mask, BITS, INT8, D)
