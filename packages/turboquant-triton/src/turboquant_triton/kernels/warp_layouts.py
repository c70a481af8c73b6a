"""Register and shared-memory layouts of attention by single warps.

Rows of a tile are tokens in an order of their own: row ``8 * inside + group`` is token ``BLOCK / 8 * group + inside``.
A lane holds every eighth row of a tensor-core operand, so its tokens lie side by side in memory.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.experimental.gluon import language as gl

PRODUCT = tl.constexpr(gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[1, 1], instr_shape=[16, 8]))
LANES = tl.constexpr(gl.BlockedLayout([1], [32], [1], [0]))
SCALE_SHARED = tl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
SCALE_COPY = tl.constexpr(gl.BlockedLayout([1, 1], [8, 4], [1, 1], [1, 0]))
# Copies of 16 bytes pass by the first-level cache, which then asks the second for each sector of 32 bytes by itself and
# again for one that two copies read; those of 8 bytes ask for lines of 128 bytes: a fifth of the requests at 3 bits.
COPY_BYTES = tl.constexpr(8)


@triton.constexpr_function
def tile_rows(block, halves):
    """Rows of a tile of ``block`` tokens; with ``halves``, those from ``block`` on are the second halves of rows."""
    return 2 * block if halves else block


@triton.constexpr_function
def copy_bits(row_bytes, itemsize, block, halves, apart):
    """Which bits of (row, column) lanes, and then further copies of a lane, run over; the rows are those of a tile.

    Lanes read what lies together in memory. Groups of tokens may lie ``apart``, in pages smaller than a tile; lanes
    then run over the groups early, so that each needs few pages. With ``halves``, rows from ``block`` on are the second
    halves of rows.
    """
    piece = [[0, (COPY_BYTES.value // itemsize) << i] for i in range((row_bytes // COPY_BYTES.value).bit_length() - 1)]
    token = [*piece, [block, 0]] if halves else piece
    inside = [[8 << i, 0] for i in range((block // 8).bit_length() - 1)]
    group = [[1, 0], [2, 0], [4, 0]]
    return [*token, *group, *inside] if apart else [*token, *inside, *group]


@triton.constexpr_function
def copy_layout(row_bytes, itemsize, block, halves, apart):
    """A tile of rows as copies of ``COPY_BYTES`` (:func:`copy_bits`)."""
    item = [[0, 1 << i] for i in range((COPY_BYTES.value // itemsize).bit_length() - 1)]
    bits = copy_bits(row_bytes, itemsize, block, halves, apart)
    shape = [tile_rows(block, halves), row_bytes // itemsize]
    return gl.DistributedLinearLayout(item + bits[5:], bits[:5], [], [], shape)


@triton.constexpr_function
def group_layout(row_bytes, block, halves, apart):
    """``[rows / 8, 8]`` of (half and inside, group) as the rows of a tile lie in :func:`copy_layout`."""
    bits = [[row >> 3, row & 7] for row, _ in copy_bits(row_bytes, 1, block, halves, apart)]
    copies = [bit for bit in bits[5:] if any(bit)]
    return gl.DistributedLinearLayout(copies, bits[:5], [], [], [tile_rows(block, halves) // 8, 8])


@triton.constexpr_function
def scale_group_layout(block):
    """``[block / 8, 8]`` of (inside, group) as the pairs of scales lie in ``SCALE_COPY``."""
    inside = [[1 << i, 0] for i in range((block // 8).bit_length() - 1)]
    return gl.DistributedLinearLayout(inside, [[0, 0], [0, 0], [0, 1], [0, 2], [0, 4]], [], [], [block // 8, 8])


@triton.constexpr_function
def row_shared_layout(row_bytes, itemsize):
    """A tile of rows in shared memory, swizzled so that eight rows of an operand lie in different banks."""
    per_phase = max(128 // row_bytes, 1)
    phases = max(min(8 // per_phase, row_bytes // 16), 1)
    return gl.SwizzledSharedLayout(16 // itemsize, per_phase, phases, [1, 0])


@triton.constexpr_function
def token_layout(block, itemsize):
    """Scales ``[8, block / 8]`` of (group, inside), or pairs of them, as the rows of an operand lie in lanes."""
    width = block // 8 // itemsize
    registers = [[0, 1 << i] for i in range(width.bit_length() - 1)]
    return gl.DistributedLinearLayout(registers, [[0, 0], [0, 0], [1, 0], [2, 0], [4, 0]], [], [], [8, width])
