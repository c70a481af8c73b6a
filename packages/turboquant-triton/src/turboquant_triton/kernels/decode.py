"""Code rows and scales outside pages back to vectors."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from turboquant_core import Codec, Packed

from ..input_checks import check_codes
from ..launch import aligned, bits_code, decode_block, decode_columns, rotation_operand, unit_dtype
from .unrotate import load_level_rows, unrotate_to
from .widths import row_bytes, unit_bytes


@triton.jit(do_not_specialize=["rows", "inner"])
def decode_kernel(
    codes,  # units [rows, D * BITS / bits of a unit]
    scales,  # fp16 [rows]
    center,  # float32 [inner, D]
    signs,  # float32 [D]
    matrix,  # fp16 [positions, padded D]
    levels,
    out,  # [rows, D]
    rows,
    inner,
    D: tl.constexpr,
    BITS: tl.constexpr,
    INT8: tl.constexpr,
    HAS_CENTER: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    ROW_UNITS: tl.constexpr = row_bytes(D, BITS) // unit_bytes(BITS)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = row < rows
    level = load_level_rows(codes + row.to(tl.int64) * ROW_UNITS, valid, levels, BITS, INT8, D)
    scale = tl.load(scales + row, mask=valid, other=0.0).to(tl.float32)
    target = out + row.to(tl.int64) * D
    unrotate_to(target, center + (row % inner) * D, valid, level, scale, matrix, signs, D, HAS_CENTER, WIDTH)


def decode(packed: Packed, codec: Codec, dtype: torch.dtype = torch.float32) -> Tensor:
    """:meth:`turboquant_core.KernelProvider.decode` in one launch.

    Raises:
        ValueError: codes or scales have the wrong dtype or shape, or are on another device than the codec.
    """
    check_codes(packed, codec)
    layout = codec.layout
    out = torch.empty((*packed.scales.shape, layout.head_dim), dtype=dtype, device=codec.device)
    rows = packed.scales.numel()
    if rows == 0:
        return out
    block = decode_block(rows, layout.head_dim, codec.device)
    decode_kernel[(-(-rows // block),)](
        aligned(packed.codes, layout).view(unit_dtype(layout)),
        packed.scales.contiguous(),
        codec.signs if codec.center is None else codec.center,
        codec.signs,
        rotation_operand(layout.head_dim, layout.bits, codec.device),
        codec.levels,
        out,
        rows,
        1 if codec.center is None else codec.center.shape[0],
        D=layout.head_dim,
        BITS=bits_code(layout),
        INT8=layout.form == "int8",
        HAS_CENTER=codec.center is not None,
        WIDTH=decode_columns(layout.head_dim, block),
        BLOCK=block,
        num_warps=4,
    )
    return out
