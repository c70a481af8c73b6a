"""Vectors to code rows and scales, outside pages."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from turboquant_core import Codec, Packed
from turboquant_core.reference.vectors import check_vectors

from ..launch import adjacent, check_packable, rotation_operand, rows_config, unit_dtype
from .pack import pack, store_units
from .quantize import load_codebook, quantize, stored_scale
from .rotate import rotate_rows, whole_matrix


@triton.jit
def encode_rows(
    row,
    center_row,
    valid,
    signs,
    operand,
    codebook,
    D: tl.constexpr,
    BITS: tl.constexpr,
    INT8: tl.constexpr,
    RULE: tl.constexpr,
    HAS_CENTER: tl.constexpr,
    SPLIT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Units (as :func:`pack` gives them) and fp16 scales of the vectors at ``row`` (pointers)."""
    rotated, multiplier = rotate_rows(row, center_row, valid, signs, operand, D, HAS_CENTER, SPLIT, WIDTH)
    index, negative, scale, finite = quantize(rotated, codebook, BITS, RULE, D, D // (8 if BITS == 4 else 16))
    units = pack(index, negative, finite, BITS, INT8)
    return units, stored_scale(scale / multiplier * (1.0 / tl.sqrt(D * 1.0)), finite)


@triton.jit
def encode_kernel(
    x,
    center,  # float32 [inner, D]
    signs,  # float32 [D]
    matrix,  # fp16 [positions, padded D]
    boundaries,
    levels,
    codes,  # units [rows, D * BITS / bits of a unit]
    scales,  # fp16 [rows]
    rows,
    inner,
    outer_stride,
    inner_stride,
    D: tl.constexpr,
    BITS: tl.constexpr,
    INT8: tl.constexpr,
    RULE: tl.constexpr,
    HAS_CENTER: tl.constexpr,
    SPLIT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    ROW_UNITS: tl.constexpr = D * BITS // (16 if BITS == 3 else 32)
    operand = whole_matrix(matrix, signs, D, WIDTH)
    codebook = load_codebook(boundaries, levels, BITS)
    for block in range(tl.program_id(0), tl.cdiv(rows, BLOCK), tl.num_programs(0)):
        row = block * BLOCK + tl.arange(0, BLOCK)
        valid = row < rows
        source = x + (row // inner).to(tl.int64) * outer_stride + (row % inner).to(tl.int64) * inner_stride
        units, scale = encode_rows(
            source, center + (row % inner) * D, valid, signs, operand, codebook,
            D, BITS, INT8, RULE, HAS_CENTER, SPLIT, WIDTH,
        )  # fmt: skip
        store_units(codes + row.to(tl.int64) * ROW_UNITS, units, valid, BITS, D)
        tl.store(scales + row, scale, mask=valid)


def encode(x: Tensor, codec: Codec) -> Packed:
    """:meth:`turboquant_core.KernelProvider.encode` in one launch.

    Any strides; copied first when the coordinates of a vector are not adjacent or the leading dimensions are not evenly
    spaced.

    Raises:
        ValueError: wrong dtype or shape, or ``x`` is on another device than the codec.
    """
    check_vectors(x, codec, "x")
    layout = codec.layout
    check_packable(layout)
    codes = torch.empty((*x.shape[:-1], layout.code_bytes), dtype=torch.uint8, device=x.device)
    scales = torch.empty(x.shape[:-1], dtype=torch.float16, device=x.device)
    if scales.numel() == 0:
        return Packed(codes, scales)
    vectors = as_vectors(x)
    config = rows_config(scales.numel(), layout.head_dim, x.device)
    encode_kernel[(config.programs,)](
        vectors,
        codec.signs if codec.center is None else codec.center,
        codec.signs,
        rotation_operand(layout.head_dim, layout.bits, x.device),
        codec.boundaries,
        codec.levels,
        codes.view(unit_dtype(layout)),
        scales,
        scales.numel(),
        vectors.shape[1],
        vectors.stride(0),
        vectors.stride(1),
        D=layout.head_dim,
        BITS=layout.bits,
        INT8=layout.form == "int8",
        RULE=codec.scale_rule,
        HAS_CENTER=codec.center is not None,
        SPLIT=needs_split(vectors, codec),
        WIDTH=config.width_of(layout.head_dim),
        BLOCK=config.block,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return Packed(codes, scales)


def as_vectors(x: Tensor) -> Tensor:
    """``[..., n, head_dim]`` as ``[outer, n, head_dim]`` with adjacent coordinates, without a copy where possible."""
    return adjacent(x).reshape(-1, x.shape[-2] if x.dim() > 1 else 1, x.shape[-1])


def needs_split(x: Tensor, codec: Codec) -> bool:
    """Whether a coordinate takes two fp16 numbers: float32 input, or a float32 centre to subtract."""
    return x.dtype == torch.float32 or codec.center is not None
