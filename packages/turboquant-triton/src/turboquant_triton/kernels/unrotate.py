"""Levels of packed rows, and the inverse rotation on the tensor cores, to single precision."""

from __future__ import annotations

import triton
import triton.language as tl

from .pack import unpack
from .rotate import split
from .widths import first_width, is_mixed, row_bytes, second_width

# Levels times this are far above the smallest fp16, so that both parts of a split keep their bits.
LEVEL_UNIT = tl.constexpr(1024.0)


@triton.jit
def load_level_rows(row, valid, levels, BITS: tl.constexpr, INT8: tl.constexpr, D: tl.constexpr):
    """Levels of the code rows at ``row`` (pointers to units): float32 ``[rows, positions]``, padding included."""
    if is_mixed(BITS):
        FIRST: tl.constexpr = first_width(BITS)
        first = tl.load(levels + unpack(row, valid, FIRST, INT8, D // 2))
        second_row = row + row_bytes(D // 2, FIRST) // 2
        second = tl.load(levels + (1 << FIRST) + unpack(second_row, valid, second_width(BITS), INT8, D // 2))
        both = tl.permute(tl.join(first, second), (0, 2, 1))
        return tl.reshape(both, (valid.shape[0], triton.next_power_of_2(D)))
    else:
        return tl.load(levels + unpack(row, valid, BITS, INT8, D))


@triton.jit
def load_columns(matrix, signs, first, D: tl.constexpr, WIDTH: tl.constexpr):
    """Operand of the inverse rotation for coordinates ``first .. first + WIDTH - 1``: fp16 ``[positions, WIDTH]``."""
    PADDED: tl.constexpr = triton.next_power_of_2(D)
    position = tl.arange(0, PADDED)
    coordinate = first + tl.arange(0, WIDTH)
    sign = tl.load(signs + coordinate, mask=coordinate < D, other=0.0).to(tl.float16)
    return tl.load(matrix + position[:, None] * PADDED + coordinate[None, :]) * sign[None, :]


@triton.jit
def unrotate_to(
    target,
    center_row,
    valid,
    level,
    scale,
    matrix,
    signs,
    D: tl.constexpr,
    HAS_CENTER: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Write ``scale * diag(signs) H^T level / sqrt(D)``, centre added, to the vectors at ``target`` (pointers)."""
    high, low = split(level * LEVEL_UNIT)
    factor = (scale * (1.0 / (LEVEL_UNIT * tl.sqrt(D * 1.0))))[:, None]
    for first in tl.static_range(0, triton.next_power_of_2(D), WIDTH):
        columns = load_columns(matrix, signs, first, D, WIDTH)
        x = tl.dot(high, columns, tl.dot(low, columns)) * factor
        coordinate = first + tl.arange(0, WIDTH)[None, :]
        mask = valid[:, None] & (coordinate < D)
        if HAS_CENTER:
            x += tl.load(center_row[:, None] + coordinate, mask=mask, other=0.0)
        tl.store(target[:, None] + coordinate, x.to(target.dtype.element_ty), mask=mask)


@triton.jit
def rotated_to(target, valid, level, scale, BITS: tl.constexpr, D: tl.constexpr):
    """Write ``scale * level`` in the order of coordinates to the vectors at ``target`` (pointers)."""
    if is_mixed(BITS):
        halves = tl.reshape(level, (level.shape[0], 2, level.shape[1] // 2))
        first, second = tl.split(tl.permute(halves, (0, 2, 1)))
        rotated_part_to(target, valid, first, scale, first_width(BITS), D // 2)
        rotated_part_to(target + D // 2, valid, second, scale, second_width(BITS), D // 2)
    else:
        rotated_part_to(target, valid, level, scale, BITS, D)


@triton.jit
def rotated_part_to(target, valid, level, scale, BITS: tl.constexpr, D: tl.constexpr):
    """:func:`rotated_to` for codes of one width."""
    ROWS: tl.constexpr = level.shape[0]
    PADDED: tl.constexpr = level.shape[1]
    GROUPS: tl.constexpr = 1 if BITS == 4 else (4 if BITS == 3 else 2)
    FIELDS: tl.constexpr = 4 if BITS == 3 else 8
    tile = tl.reshape(level * scale[:, None], (ROWS, GROUPS, FIELDS, PADDED // GROUPS // FIELDS))
    tile = tl.reshape(tl.permute(tile, (0, 1, 3, 2)), (ROWS, PADDED))
    position = tl.arange(0, PADDED)[None, :]
    inside = position % (PADDED // GROUPS)
    coordinate = (position // (PADDED // GROUPS)) * (D // GROUPS) + inside
    mask = valid[:, None] & (inside < D // GROUPS)
    tl.store(target[:, None] + coordinate, tile.to(target.dtype.element_ty), mask=mask)
