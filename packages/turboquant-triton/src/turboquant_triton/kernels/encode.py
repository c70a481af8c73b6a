"""Vectors to code rows and scales, outside pages."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from turboquant_core import Codec, Packed
from turboquant_core.reference.vectors import check_vectors

from ..launch import adjacent, bits_code, check_packable, part_columns, rotation_operand, rows_config, unit_dtype
from .pack import pack_part, store_units
from .quantize import (
    level_index,
    load_bounds,
    load_indices,
    load_levels,
    nearest,
    nearest_index,
    stored_scale,
    vector_scale,
)
from .rotate import load_vectors, power_of_two, rotate_part, signed_halves
from .search import best_trial, both_sums, search_sums
from .widths import code_fields, first_width, is_mixed, lowest_word, row_bytes, second_width, unit_bytes


@triton.jit
def encode_part(
    halves,
    matrix,
    normalize,
    finite,
    boundaries,
    levels,
    position,
    D: tl.constexpr,
    SIZE: tl.constexpr,
    BITS: tl.constexpr,
    INT8: tl.constexpr,
    RULE: tl.constexpr,
    SPLIT: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Words of the ``SIZE`` coordinates from ``position`` on in codes of one width, and the sums that the scale needs.

    The sums are ``<u, l>`` and ``|l|^2`` of coordinates ``u``, which ``normalize`` ``[rows]`` brings to the units of
    levels, and their levels ``l``. The rule ``searched`` has them already.
    """
    ROWS: tl.constexpr = normalize.shape[0]
    POSITIONS: tl.constexpr = triton.next_power_of_2(SIZE)
    FIELDS: tl.constexpr = code_fields(BITS)
    UNITS: tl.constexpr = POSITIONS // FIELDS
    if RULE == "searched":
        table = load_indices(boundaries, BITS)
    else:
        bounds = load_bounds(boundaries, BITS)
        table = load_levels(levels, boundaries, BITS)
    inner = tl.zeros((ROWS, COLUMNS), tl.float32)
    power = tl.zeros((ROWS, COLUMNS), tl.float32)
    present = (tl.arange(0, COLUMNS) % UNITS < SIZE // FIELDS)[None, :]
    word = tl.zeros((ROWS, UNITS), tl.int32)
    other = tl.zeros((ROWS, UNITS), tl.int32)
    for first in range(0, POSITIONS, COLUMNS):
        rotated = rotate_part(halves, matrix, position + first, D, SPLIT, COLUMNS) * normalize[:, None]
        if RULE == "searched":
            index = nearest_index(tl.abs(rotated), table, BITS)
        else:
            level = nearest(tl.abs(rotated), bounds, table, BITS)
            index = level_index(level)
        word, other = pack_part((word, other), index, (rotated > 0) == 0, first // UNITS, BITS, INT8)
        if RULE == "unbiased" or RULE == "least_squares":
            inner += tl.abs(rotated) * level
        if RULE == "renorm" or RULE == "least_squares":
            power += tl.where(present, level * level, 0.0)
    word = tl.where(finite[:, None], word, lowest_word(BITS, INT8))
    return (word, tl.where(finite[:, None], other, 0)), tl.sum(inner, 1), tl.sum(power, 1)


@triton.jit
def encode_rows(
    row,
    center_row,
    valid,
    signs,
    matrix,
    boundaries,
    levels,
    D: tl.constexpr,
    BITS: tl.constexpr,
    INT8: tl.constexpr,
    RULE: tl.constexpr,
    HAS_CENTER: tl.constexpr,
    SPLIT: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Words (as :func:`store_units` takes them) and fp16 scales of the vectors at ``row`` (pointers)."""
    x = load_vectors(row, center_row, valid, D, HAS_CENTER)
    multiplier = power_of_two(x)
    x *= multiplier[:, None]
    energy = tl.sum(x * x, 1)
    # The rotation here lacks its 1 / sqrt(D), so the root mean square of its coordinates is the norm of x.
    normalize = tl.where(energy > 0, tl.rsqrt(energy), 0.0)
    finite = energy < float("inf")
    halves = signed_halves(x, signs, D, SPLIT)
    rms = tl.sqrt(energy / D) / multiplier
    FIRST: tl.constexpr = first_width(BITS) if is_mixed(BITS) else BITS
    SIZE: tl.constexpr = D // 2 if is_mixed(BITS) else D
    SECOND: tl.constexpr = second_width(BITS)
    HALF: tl.constexpr = triton.next_power_of_2(D) // 2
    boundaries2 = boundaries + (1 << FIRST) - 1
    levels2 = levels + (1 << FIRST)
    if RULE == "searched":
        sums = search_sums(halves, matrix, normalize, boundaries, levels, 0, D, SIZE, FIRST, SPLIT, COLUMNS)
        if is_mixed(BITS):
            second = search_sums(halves, matrix, normalize, boundaries2, levels2, HALF, D, SIZE, SECOND, SPLIT, COLUMNS)
            sums = both_sums(sums, second)
        factor, best = best_trial(sums)
        normalize *= factor
    words, inner, power = encode_part(
        halves, matrix, normalize, finite, boundaries, levels, 0, D, SIZE, FIRST, INT8, RULE, SPLIT, COLUMNS
    )
    if is_mixed(BITS):
        words2, inner2, power2 = encode_part(
            halves, matrix, normalize, finite, boundaries2, levels2,
            HALF, D, SIZE, SECOND, INT8, RULE, SPLIT, COLUMNS,
        )  # fmt: skip
        words += words2
        inner += inner2
        power += power2
    if RULE == "searched":
        inner = best
    return words, stored_scale(vector_scale(rms, inner, power, RULE, D), finite)


@triton.jit(do_not_specialize=["rows", "inner"])
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
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    ROW_UNITS: tl.constexpr = row_bytes(D, BITS) // unit_bytes(BITS)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = row < rows
    source = x + (row // inner).to(tl.int64) * outer_stride + (row % inner).to(tl.int64) * inner_stride
    words, scale = encode_rows(
        source, center + (row % inner) * D, valid, signs, matrix, boundaries, levels,
        D, BITS, INT8, RULE, HAS_CENTER, SPLIT, COLUMNS,
    )  # fmt: skip
    store_units(codes + row.to(tl.int64) * ROW_UNITS, words, valid, BITS, D)
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
    config = rows_config(scales.numel(), x.device, layout)
    encode_kernel[(-(-scales.numel() // config.block),)](
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
        BITS=bits_code(layout),
        INT8=layout.form == "int8",
        RULE=codec.scale_rule,
        HAS_CENTER=codec.center is not None,
        SPLIT=needs_split(vectors, codec),
        COLUMNS=part_columns(layout, config),
        BLOCK=config.block,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return Packed(codes, scales)


def as_vectors(x: Tensor) -> Tensor:
    """``[..., n, head_dim]`` as ``[outer, n, head_dim]`` with adjacent coordinates, without a copy where possible."""
    x = adjacent(x)
    return x.reshape(-1, x.shape[-2] if x.dim() > 1 else 1, x.shape[-1])


def needs_split(x: Tensor, codec: Codec) -> bool:
    """Whether a coordinate takes two fp16 numbers: float32 input, or a float32 centre to subtract."""
    return x.dtype == torch.float32 or codec.center is not None
