"""Vectors to code rows and scales, outside pages."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from turboquant_core import Codec, Packed
from turboquant_core.reference.vectors import check_vectors
from turboquant_core.scale import MULTIPLIERS

from ..launch import adjacent, bits_code, check_packable, part_columns, rotation_operand, rows_config, unit_dtype
from .pack import pack_part, store_units
from .quantize import level_index, load_bounds, load_levels, nearest, stored_scale, vector_scale
from .rotate import load_vectors, power_of_two, rotate_part, signed_halves
from .widths import code_fields, first_width, is_mixed, lowest_word, row_bytes, second_width, unit_bytes

LEAST_MULTIPLIER = tl.constexpr(MULTIPLIERS[0])
MULTIPLIER_STEP = tl.constexpr(MULTIPLIERS[1] - MULTIPLIERS[0])
MULTIPLIER_COUNT = tl.constexpr(len(MULTIPLIERS))
TRIALS = tl.constexpr(triton.next_power_of_2(len(MULTIPLIERS)))


@triton.jit
def search_sums(
    halves,
    matrix,
    normalize,
    boundaries,
    levels,
    position,
    D: tl.constexpr,
    SIZE: tl.constexpr,
    BITS: tl.constexpr,
    SPLIT: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """``<u, l>`` and ``|l|^2`` ``[rows, TRIALS]``, ``l`` the levels nearest to multiples of a part's coordinates."""
    ROWS: tl.constexpr = normalize.shape[0]
    POSITIONS: tl.constexpr = triton.next_power_of_2(SIZE)
    FIELDS: tl.constexpr = code_fields(BITS)
    UNITS: tl.constexpr = POSITIONS // FIELDS
    bounds = load_bounds(boundaries, BITS)
    table = load_levels(levels, boundaries, BITS)
    trial = tl.arange(0, TRIALS)[None, :]
    inner = tl.zeros((ROWS, TRIALS), tl.float32)
    power = tl.zeros((ROWS, TRIALS), tl.float32)
    present = (tl.arange(0, COLUMNS) % UNITS < SIZE // FIELDS)[None, :]
    for first in range(0, POSITIONS, COLUMNS):
        rotated = rotate_part(halves, matrix, position + first, D, SPLIT, COLUMNS) * normalize[:, None]
        magnitude = tl.abs(rotated)
        for index in range(MULTIPLIER_COUNT):
            level = nearest(magnitude * (LEAST_MULTIPLIER + MULTIPLIER_STEP * index), bounds, table, BITS)
            own = trial == index
            inner += tl.where(own, tl.sum(magnitude * level, 1)[:, None], 0.0)
            if POSITIONS != SIZE:
                level = tl.where(present, level, 0.0)
            power += tl.where(own, tl.sum(level * level, 1)[:, None], 0.0)
    return inner, power


@triton.jit
def best_multiplier(inner, power):
    """The multiplier ``[rows]`` of the largest cosine, the first of equals; see :mod:`turboquant_core.search`."""
    trial = tl.arange(0, TRIALS)[None, :]
    tried = trial < MULTIPLIER_COUNT
    squared_cosine = tl.where(tried, inner * inner / tl.where(tried, power, 1.0), -1.0)
    return LEAST_MULTIPLIER + MULTIPLIER_STEP * tl.argmax(squared_cosine, 1).to(tl.float32)


@triton.jit
def encode_part(
    halves,
    matrix,
    normalize,
    multiplier,
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

    Codes are those of the coordinates times ``multiplier`` ``[rows]``, which is 1.0 where the rule does not search.
    The sums are ``<u, l>`` and ``|l|^2`` of coordinates ``u`` and their levels ``l`` in units of the root mean square.
    """
    ROWS: tl.constexpr = normalize.shape[0]
    POSITIONS: tl.constexpr = triton.next_power_of_2(SIZE)
    FIELDS: tl.constexpr = code_fields(BITS)
    UNITS: tl.constexpr = POSITIONS // FIELDS
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
            level = nearest(tl.abs(rotated) * multiplier[:, None], bounds, table, BITS)
        else:
            level = nearest(tl.abs(rotated), bounds, table, BITS)
        negative = (rotated > 0) == 0
        word, other = pack_part((word, other), level_index(level), negative, first // UNITS, BITS, INT8)
        if RULE == "unbiased" or RULE == "searched" or RULE == "least_squares":
            inner += tl.abs(rotated) * level
        if RULE == "renorm" or RULE == "least_squares":
            power += tl.where(present, level * level, 0.0)
    word = tl.where(finite[:, None], word, lowest_word(BITS, INT8))
    return word, tl.where(finite[:, None], other, 0), tl.sum(inner, 1), tl.sum(power, 1)


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
    if is_mixed(BITS):
        FIRST: tl.constexpr = first_width(BITS)
        HALF: tl.constexpr = triton.next_power_of_2(D) // 2
        factor = 1.0
        if RULE == "searched":
            inner, power = search_sums(
                halves, matrix, normalize, boundaries, levels, 0, D, D // 2, FIRST, SPLIT, COLUMNS
            )
            inner2, power2 = search_sums(
                halves, matrix, normalize, boundaries + (1 << FIRST) - 1, levels + (1 << FIRST),
                HALF, D, D // 2, second_width(BITS), SPLIT, COLUMNS,
            )  # fmt: skip
            factor = best_multiplier(inner + inner2, power + power2)
        word, other, inner, power = encode_part(
            halves, matrix, normalize, factor, finite, boundaries, levels,
            0, D, D // 2, FIRST, INT8, RULE, SPLIT, COLUMNS,
        )  # fmt: skip
        word2, other2, inner2, power2 = encode_part(
            halves, matrix, normalize, factor, finite, boundaries + (1 << FIRST) - 1, levels + (1 << FIRST),
            HALF, D, D // 2, second_width(BITS), INT8, RULE, SPLIT, COLUMNS,
        )  # fmt: skip
        scale = vector_scale(rms, inner + inner2, power + power2, RULE, D)
        return (word, other, word2, other2), stored_scale(scale, finite)
    else:
        factor = 1.0
        if RULE == "searched":
            inner, power = search_sums(halves, matrix, normalize, boundaries, levels, 0, D, D, BITS, SPLIT, COLUMNS)
            factor = best_multiplier(inner, power)
        word, other, inner, power = encode_part(
            halves, matrix, normalize, factor, finite, boundaries, levels,
            0, D, D, BITS, INT8, RULE, SPLIT, COLUMNS,
        )  # fmt: skip
        return (word, other), stored_scale(vector_scale(rms, inner, power, RULE, D), finite)


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
    config = rows_config(scales.numel(), x.device)
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
        COLUMNS=part_columns(layout),
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
