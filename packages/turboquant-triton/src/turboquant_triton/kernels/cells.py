"""Tables over cells of a magnitude, for codebooks that are symmetric about 0.

Cells are narrow enough that an entry of one boundary serves a whole cell, and few enough that no two entries, of 4 or 8
bytes, lie in one bank of shared memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

CELLS = tl.constexpr(16)
CELLS_PER_UNIT = tl.constexpr(5.5)
# In the last cell, which has no end.
BEYOND = tl.constexpr(2.75)
LOW_WORD = tl.constexpr(0xFFFFFFFF)


@triton.jit
def cell_of(magnitude, FRACTION_BITS: tl.constexpr):
    """Cell of each magnitude, int32; cell ``c`` begins at ``cell_start(c)``.

    A number below ``2**(22 - FRACTION_BITS)``, plus three times that and read as an integer, counts fractions of a
    cell. With ``2**FRACTION_BITS`` bytes an entry, their count is its address but for the bits to mask out.
    """
    ABOVE: tl.constexpr = 3 * 2.0 ** (22 - FRACTION_BITS)
    fractions = (tl.minimum(magnitude, BEYOND) * CELLS_PER_UNIT + ABOVE).to(tl.int32, bitcast=True)
    return (fractions >> FRACTION_BITS) & (CELLS - 1)


@triton.jit
def cell_start(cell, FRACTION_BITS: tl.constexpr):
    """Where a cell begins: what rounds to its first fraction."""
    return (cell.to(tl.float32) - 0.5 / (1 << FRACTION_BITS)) / CELLS_PER_UNIT


@triton.jit
def boundaries_below(first, limit, BITS: tl.constexpr):
    """How many positive boundaries (the first at ``first``) each ``limit`` exceeds; int32."""
    count = tl.zeros_like(limit).to(tl.int32)
    for index in tl.static_range((1 << (BITS - 1)) - 1):
        count += (tl.load(first + index) < limit).to(tl.int32)
    return count


@triton.jit
def boundary_reached(first, multiplier, BITS: tl.constexpr):
    """Index int32 ``[CELLS]`` of the boundary that ``multiplier`` times a magnitude of each cell reaches next.

    The last boundary where all are below. Entries are of 8 bytes.
    """
    start = cell_start(tl.arange(0, CELLS), 3) * multiplier
    return tl.minimum(boundaries_below(first, start, BITS), (1 << (BITS - 1)) - 2)


@triton.jit
def pair(low, high):
    """Entries int64 of two 32-bit numbers, which one load of 8 bytes brings."""
    low = low.to(tl.int32, bitcast=True).to(tl.int64) & LOW_WORD
    return (high.to(tl.int32, bitcast=True).to(tl.int64) << 32) | low


@triton.jit
def unpair(entry):
    """The two int32 numbers of entries that :func:`pair` made."""
    return entry.to(tl.int32), (entry >> 32).to(tl.int32)


@triton.jit
def look_up(table, index):
    """``table[index]`` for indices ``[rows, columns]``."""
    flat = tl.gather(table, tl.reshape(index, (index.shape[0] * index.shape[1],)), 0)
    return tl.reshape(flat, index.shape)
