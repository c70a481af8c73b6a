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
SCALE_LANES = tl.constexpr(4)
SCALE_COPY = tl.constexpr(gl.BlockedLayout([1, 1], [8, SCALE_LANES.value], [1, 1], [1, 0]))


@triton.constexpr_function
def row_copy_layout(row_bytes, itemsize):
    """A tile of rows as 16-byte copies, row after row."""
    lanes = row_bytes // 16
    return gl.BlockedLayout([1, 16 // itemsize], [32 // lanes, lanes], [1, 1], [1, 0])


@triton.constexpr_function
def row_shared_layout(row_bytes, itemsize):
    """A tile of rows in shared memory, swizzled so that eight rows of an operand lie in different banks."""
    per_phase = max(128 // row_bytes, 1)
    phases = max(min(8 // per_phase, row_bytes // 16), 1)
    return gl.SwizzledSharedLayout(16 // itemsize, per_phase, phases, [1, 0])


@triton.constexpr_function
def group_layout(lanes, block):
    """``[block / 8, 8]`` of (inside, group) as the rows of a tile lie in copies of ``lanes`` a row."""
    inside = [[1 << i, 0] for i in range((block // 8).bit_length() - 1)]
    rows = [[0, 1], [0, 2], [0, 4], *inside]
    unused = lanes.bit_length() - 1
    used = rows[: 5 - unused]
    missing = [[0, 0]] * (5 - unused - len(used))
    return gl.DistributedLinearLayout(rows[5 - unused :], [[0, 0]] * unused + used + missing, [], [], [block // 8, 8])


@triton.constexpr_function
def token_layout(block, itemsize):
    """Scales ``[8, block / 8]`` of (group, inside), or pairs of them, as the rows of an operand lie in lanes."""
    width = block // 8 // itemsize
    registers = [[0, 1 << i] for i in range(width.bit_length() - 1)]
    return gl.DistributedLinearLayout(registers, [[0, 0], [0, 0], [1, 0], [2, 0], [4, 0]], [], [], [8, width])
