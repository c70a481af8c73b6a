"""Codes of a tile to code rows and back (table "A code row" of the layout).

A code row is a sequence of units of 32 bits (16 at 3 bits), all with the same fields. A tile holds its coordinates as
``[groups, fields, units]``, the order of :func:`turboquant_triton.launch.coordinates`, so packing is elementwise.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .widths import first_width, is_mixed, row_bytes, second_width

NIBBLE_ONES = tl.constexpr(0x1111)


@triton.jit
def sign_shift(field):
    """Bit of the sign of coordinate ``field`` of a 4-bit int8 unit."""
    return tl.where(field < 4, 8 * field + 7, 8 * field - 29)


@triton.jit
def union(a, b):
    """Combine function of a reduction over disjoint bits."""
    return a | b


@triton.jit
def pack_part(words, index, negative, first_field, BITS: tl.constexpr, INT8: tl.constexpr):
    """Add fields ``first_field`` on to ``words``, two int32 ``[rows, units]``.

    ``index`` (of the level's magnitude) and ``negative`` are ``[rows, fields * units]``. At 3 bits the first word holds
    groups 0 and 1 as two times four nibbles, the second groups 2 and 3; else only the first is used.
    """
    ROWS: tl.constexpr = words[0].shape[0]
    UNITS: tl.constexpr = words[0].shape[1]
    FIELDS: tl.constexpr = index.shape[1] // UNITS
    HALF: tl.constexpr = 1 << (BITS - 1)
    field = (first_field + tl.arange(0, FIELDS))[None, :, None]
    if BITS == 4 and INT8:
        magnitude = tl.reshape(index, (ROWS, FIELDS, UNITS)) << (4 * field)
        sign = tl.where(tl.reshape(negative, (ROWS, FIELDS, UNITS)), 1 << sign_shift(field), 0)
        return words[0] | tl.reduce(magnitude | sign, 1, union), words[1]
    else:
        code = tl.reshape(index ^ tl.where(negative, HALF - 1, HALF), (ROWS, FIELDS, UNITS))
        if BITS == 3:
            part = code << (4 * (field % 8))
            front = first_field < 8
            if FIELDS > 8:
                front = field < 8
            else:
                part = tl.reduce(part, 1, union)
            first, second = tl.where(front, part, 0), tl.where(front, 0, part)
            if FIELDS > 8:
                first, second = tl.reduce(first, 1, union), tl.reduce(second, 1, union)
            return words[0] | first, words[1] | second
        elif BITS == 2:
            return words[0] | tl.reduce(code << (4 * (field % 8) + 2 * (field // 8)), 1, union), words[1]
        else:
            return words[0] | tl.reduce(code << (4 * field), 1, union), words[1]


@triton.jit
def store_plane(row, plane, nibbles, rest, valid, D: tl.constexpr):
    """Write one plane of 3-bit code rows: its own nibbles, and one bit of each of ``rest`` as their fourth."""
    UNITS: tl.constexpr = D // 16
    unit = tl.arange(0, triton.next_power_of_2(UNITS))[None, :]
    units = nibbles | (((rest >> plane) & NIBBLE_ONES) << 3)
    tl.store(row[:, None] + plane * UNITS + unit, units.to(tl.int16), mask=valid[:, None] & (unit < UNITS))


@triton.jit
def store_units(row, words, valid, BITS: tl.constexpr, D: tl.constexpr):
    """Write the words of each width (:func:`pack_part`) to the code rows at ``row`` (pointers to units)."""
    if is_mixed(BITS):
        store_part(row, words, valid, first_width(BITS), D // 2)
        second = row + row_bytes(D // 2, first_width(BITS)) // 2
        store_part(second, (words[2], words[3]), valid, second_width(BITS), D // 2)
    else:
        store_part(row, words, valid, BITS, D)


@triton.jit
def store_part(row, words, valid, BITS: tl.constexpr, D: tl.constexpr):
    """Write the words of one width; in units of 16 bits where ``row`` points to such."""
    HALF_UNITS: tl.constexpr = row.dtype.element_ty == tl.int16
    if BITS == 3:
        rest = words[1] >> 16
        store_plane(row, 0, words[0] & 0xFFFF, rest, valid, D)
        store_plane(row, 1, words[0] >> 16, rest, valid, D)
        store_plane(row, 2, words[1] & 0xFFFF, rest, valid, D)
    else:
        UNITS: tl.constexpr = D * BITS // 32
        unit = tl.arange(0, triton.next_power_of_2(UNITS))[None, :]
        mask = valid[:, None] & (unit < UNITS)
        if HALF_UNITS:
            tl.store(row[:, None] + 2 * unit, words[0].to(tl.int16), mask=mask)
            tl.store(row[:, None] + 2 * unit + 1, (words[0] >> 16).to(tl.int16), mask=mask)
        else:
            tl.store(row[:, None] + unit, words[0], mask=mask)


@triton.jit
def load_plane(row, plane, valid, D: tl.constexpr):
    """Units of one plane of 3-bit code rows: int32 ``[rows, units]``."""
    UNITS: tl.constexpr = D // 16
    unit = tl.arange(0, triton.next_power_of_2(UNITS))[None, :]
    mask = valid[:, None] & (unit < UNITS)
    return tl.load(row[:, None] + plane * UNITS + unit, mask=mask, other=0).to(tl.int32)


@triton.jit
def unpack3(row, valid, D: tl.constexpr):
    """Codes of 3-bit rows, int32 ``[rows, 4, 4, units]``."""
    p0 = load_plane(row, 0, valid, D)
    p1 = load_plane(row, 1, valid, D)
    p2 = load_plane(row, 2, valid, D)
    rest = ((p0 >> 3) & NIBBLE_ONES) | (((p1 >> 3) & NIBBLE_ONES) << 1) | (((p2 >> 3) & NIBBLE_ONES) << 2)
    group = tl.arange(0, 4)[None, :, None]
    nibbles = tl.where(group < 2, tl.where(group == 0, p0[:, None, :], p1[:, None, :]), p2[:, None, :])
    nibbles = tl.where(group == 3, rest[:, None, :], nibbles)
    return (nibbles[:, :, None, :] >> (4 * tl.arange(0, 4)[None, None, :, None])) & 7


@triton.jit
def load_words(row, valid, UNITS: tl.constexpr):
    """32-bit units of code rows: int32 ``[rows, units]``, in two loads where ``row`` points to 16-bit units."""
    unit = tl.arange(0, triton.next_power_of_2(UNITS))[None, :]
    mask = valid[:, None] & (unit < UNITS)
    if row.dtype.element_ty == tl.int16:
        low = tl.load(row[:, None] + 2 * unit, mask=mask, other=0).to(tl.int32) & 0xFFFF
        return low | (tl.load(row[:, None] + 2 * unit + 1, mask=mask, other=0).to(tl.int32) << 16)
    else:
        return tl.load(row[:, None] + unit, mask=mask, other=0)


@triton.jit
def unpack(row, valid, BITS: tl.constexpr, INT8: tl.constexpr, D: tl.constexpr):
    """Codes of the code rows at ``row`` (pointers to units), of one width: int32 ``[rows, positions]``."""
    ROWS: tl.constexpr = valid.shape[0]
    PADDED: tl.constexpr = triton.next_power_of_2(D)
    if BITS == 3:
        return tl.reshape(unpack3(row, valid, D), (ROWS, PADDED))
    else:
        UNITS: tl.constexpr = D * BITS // 32
        units = load_words(row, valid, UNITS)[:, None, :]
        if BITS == 2:
            field2 = tl.arange(0, 16)[None, :, None]
            return tl.reshape((units >> (4 * (field2 % 8) + 2 * (field2 // 8))) & 3, (ROWS, PADDED))
        else:
            field = tl.arange(0, 8)[None, :, None]
            nibble = (units >> (4 * field)) & 15
            if INT8:
                negative = (units >> sign_shift(field)) & 1
                nibble = (nibble & 7) ^ tl.where(negative == 1, 7, 8)
            return tl.reshape(nibble, (ROWS, PADDED))
