"""Codes of a tile to code rows and back (table "A code row" of the layout).

A code row is a sequence of units of 32 bits (16 at 3 bits), all with the same fields. A tile holds its coordinates as
``[groups, fields, units]``, the order of :func:`turboquant_triton.launch.coordinates`, so packing is elementwise.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Every field of a 4-bit int8 unit at code 0: magnitude 7, negative.
LOWEST_INT8 = tl.constexpr(-1)
NIBBLE_ONES = tl.constexpr(0x1111)


@triton.jit
def sign_shift(field):
    """Bit of the sign of coordinate ``field`` of a 4-bit int8 unit."""
    return tl.where(field < 4, 8 * field + 7, 8 * field - 29)


@triton.jit
def pack(index, negative, finite, BITS: tl.constexpr, INT8: tl.constexpr):
    """Units int32 ``[rows, units]`` (``[rows, 4, units]`` at 3 bits, the last plane unused) from magnitudes and signs.

    A row that is not ``finite`` has codes 0.
    """
    ROWS: tl.constexpr = index.shape[0]
    PADDED: tl.constexpr = index.shape[1]
    HALF: tl.constexpr = 1 << (BITS - 1)
    if BITS == 4 and INT8:
        field8 = tl.arange(0, 8)[None, :, None]
        fields = tl.reshape(index, (ROWS, 8, PADDED // 8)) << (4 * field8)
        fields |= tl.reshape(negative.to(tl.int32), (ROWS, 8, PADDED // 8)) << sign_shift(field8)
        return tl.where(finite[:, None], tl.sum(fields, 1), LOWEST_INT8)
    else:
        code = tl.where(finite[:, None], index ^ tl.where(negative, HALF - 1, HALF), 0)
        if BITS == 4:
            field4 = tl.arange(0, 8)[None, :, None]
            return tl.sum(tl.reshape(code, (ROWS, 8, PADDED // 8)) << (4 * field4), 1)
        elif BITS == 2:
            field2 = tl.arange(0, 16)[None, :, None]
            shift = 4 * (field2 % 8) + 2 * (field2 // 8)
            return tl.sum(tl.reshape(code, (ROWS, 16, PADDED // 16)) << shift, 1)
        else:
            field3 = tl.arange(0, 4)[None, None, :, None]
            nibbles = tl.sum(tl.reshape(code, (ROWS, 4, 4, PADDED // 16)) << (4 * field3), 2)
            group = tl.arange(0, 4)[None, :, None]
            rest = tl.sum(tl.where(group == 3, nibbles, 0), 1)
            return nibbles | (((tl.expand_dims(rest, 1) >> group) & NIBBLE_ONES) << 3)


@triton.jit
def store_units(row, units, valid, BITS: tl.constexpr, D: tl.constexpr):
    """Write what :func:`pack` gives to the code rows at ``row`` (pointers to units)."""
    if BITS == 3:
        UNITS3: tl.constexpr = D // 16
        unit3 = tl.arange(0, triton.next_power_of_2(UNITS3))[None, None, :]
        plane = tl.arange(0, 4)[None, :, None]
        mask = valid[:, None, None] & (plane < 3) & (unit3 < UNITS3)
        tl.store(row[:, None, None] + plane * UNITS3 + unit3, units.to(tl.int16), mask=mask)
    else:
        UNITS: tl.constexpr = D * BITS // 32
        unit = tl.arange(0, triton.next_power_of_2(UNITS))[None, :]
        tl.store(row[:, None] + unit, units, mask=valid[:, None] & (unit < UNITS))


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
def unpack(row, valid, BITS: tl.constexpr, INT8: tl.constexpr, D: tl.constexpr):
    """Codes of the code rows at ``row`` (pointers to units): int32 ``[rows, positions]``."""
    ROWS: tl.constexpr = valid.shape[0]
    PADDED: tl.constexpr = triton.next_power_of_2(D)
    if BITS == 3:
        return tl.reshape(unpack3(row, valid, D), (ROWS, PADDED))
    else:
        UNITS: tl.constexpr = D * BITS // 32
        unit = tl.arange(0, triton.next_power_of_2(UNITS))[None, :]
        units = tl.load(row[:, None] + unit, mask=valid[:, None] & (unit < UNITS), other=0)[:, None, :]
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
