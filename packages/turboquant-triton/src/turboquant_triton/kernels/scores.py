"""Scores of queries against packed keys, which are never decoded: the query is rotated instead."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from turboquant_core import Codec, Packed
from turboquant_core.reference.vectors import check_vectors

from ..input_checks import check_codes
from ..launch import (
    adjacent,
    aligned,
    bits_code,
    padded,
    part_columns,
    rotation_operand,
    rows_config,
    scores_config,
    unit_dtype,
)
from .rotate import load_vectors, power_of_two, rotate_part, signed_halves, split
from .unrotate import LEVEL_UNIT, load_level_rows
from .widths import row_bytes, unit_bytes


@triton.jit(do_not_specialize=["rows", "q_len"])
def rotate_kernel(
    query,  # [batch, q_len, D]
    signs,  # float32 [D]
    matrix,  # fp16 [positions, padded D]
    out,  # float32 [batch, q_len, positions]
    rows,
    q_len,
    batch_stride,
    query_stride,
    D: tl.constexpr,
    SPLIT: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Queries rotated, in the order of positions."""
    PADDED: tl.constexpr = triton.next_power_of_2(D)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = row < rows
    source = query + (row // q_len).to(tl.int64) * batch_stride + (row % q_len).to(tl.int64) * query_stride
    x = load_vectors(source, source, valid, D, False)
    multiplier = power_of_two(x)
    halves = signed_halves(x * multiplier[:, None], signs, D, SPLIT)
    factor = (1.0 / tl.sqrt(D * 1.0)) / multiplier
    target = out + row.to(tl.int64) * PADDED
    for first in range(0, PADDED, COLUMNS):
        rotated = rotate_part(halves, matrix, first, D, SPLIT, COLUMNS) * factor[:, None]
        tl.store(target[:, None] + first + tl.arange(0, COLUMNS)[None, :], rotated, mask=valid[:, None])


@triton.jit(do_not_specialize=["q_len"])
def scores_kernel(
    query,  # float32 [batch, q_len, positions], rotated
    codes,  # units [batch, kv_len, D * BITS / bits of a unit]
    scales,  # fp16 [batch, kv_len]
    levels,
    out,  # float32 [batch, q_len, kv_len]
    q_len,
    kv_len,
    scaling,
    D: tl.constexpr,
    BITS: tl.constexpr,
    INT8: tl.constexpr,
    BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
    TILES: tl.constexpr,
):
    """Each program scores ``BLOCK`` queries against ``TILES`` tiles of ``KEYS`` keys."""
    PADDED: tl.constexpr = triton.next_power_of_2(D)
    ROW_UNITS: tl.constexpr = row_bytes(D, BITS) // unit_bytes(BITS)
    programs = tl.cdiv(kv_len, KEYS * TILES)
    batch = (tl.program_id(0) // programs).to(tl.int64)
    first = (tl.program_id(0) % programs) * KEYS * TILES
    q = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    position = tl.arange(0, PADDED)[None, :]
    rows = (batch * q_len + q.to(tl.int64))[:, None]
    rotated = tl.load(query + rows * PADDED + position, mask=(q < q_len)[:, None], other=0.0)
    multiplier = power_of_two(rotated)
    high, low = split(rotated * multiplier[:, None])
    factor = scaling * (1.0 / LEVEL_UNIT) / multiplier
    target = out + (batch * q_len + q.to(tl.int64)) * kv_len
    for tile in range(TILES):
        k = first + tile * KEYS + tl.arange(0, KEYS)
        valid = k < kv_len
        key = batch * kv_len + k
        level = load_level_rows(codes + key * ROW_UNITS, valid, levels, BITS, INT8, D)
        scale = tl.load(scales + key, mask=valid, other=0.0).to(tl.float32)
        level_high, level_low = split(level * LEVEL_UNIT)
        score = tl.dot(low, tl.trans(level_high))
        score = tl.dot(high, tl.trans(level_low), score)
        score = tl.dot(high, tl.trans(level_high), score)
        mask = (q < q_len)[:, None] & valid[None, :]
        tl.store(target[:, None] + k[None, :], score * factor[:, None] * scale[None, :], mask=mask)


def scores(query: Tensor, packed: Packed, codec: Codec, *, scaling: float) -> Tensor:
    """:meth:`turboquant_core.KernelProvider.scores` in two launches.

    Leading dimensions broadcast; what is broadcast is copied.

    Raises:
        ValueError: wrong dtype or shape, or tensors on different devices.
    """
    check_vectors(query, codec, "query")
    check_codes(packed, codec)
    layout = codec.layout
    (q_len, head_dim), (kv_len, code_bytes) = query.shape[-2:], packed.codes.shape[-2:]
    lead = torch.broadcast_shapes(query.shape[:-2], packed.codes.shape[:-2])
    out = torch.empty((*lead, q_len, kv_len), dtype=torch.float32, device=query.device)
    if out.numel() == 0:
        return out
    queries = adjacent(query).expand(*lead, q_len, head_dim).reshape(-1, q_len, head_dim)
    codes = aligned(packed.codes.expand(*lead, kv_len, code_bytes), layout)
    rotated = _rotate(queries, codec)
    config = scores_config(kv_len, head_dim)
    grid = (-(-kv_len // (config.keys * config.tiles)) * queries.shape[0], -(-q_len // config.block))
    scores_kernel[grid](
        rotated,
        codes.view(unit_dtype(layout)),
        packed.scales.expand(*lead, kv_len).contiguous(),
        codec.levels,
        out,
        q_len,
        kv_len,
        scaling,
        D=head_dim,
        BITS=bits_code(layout),
        INT8=layout.form == "int8",
        BLOCK=config.block,
        KEYS=config.keys,
        TILES=config.tiles,
        num_warps=4,
        num_stages=1,
    )
    return out


def _rotate(queries: Tensor, codec: Codec) -> Tensor:
    """``[batch, q_len, head_dim]`` to float32 ``[batch, q_len, positions]``."""
    batch, q_len, head_dim = queries.shape
    config = rows_config(batch * q_len, queries.device, codec.layout)
    rotated = torch.empty((batch, q_len, padded(head_dim)), dtype=torch.float32, device=queries.device)
    rotate_kernel[(-(-batch * q_len // config.block),)](
        queries,
        codec.signs,
        rotation_operand(head_dim, codec.layout.bits, queries.device),
        rotated,
        batch * q_len,
        q_len,
        queries.stride(0),
        queries.stride(1),
        D=head_dim,
        SPLIT=queries.dtype == torch.float32,
        COLUMNS=part_columns(codec.layout, config),
        BLOCK=config.block,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return rotated
