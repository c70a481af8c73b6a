"""A range of tokens out of the pages of each sequence."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from turboquant_core import CacheCodec, Codec, Gathered, PageLayout

from ..input_checks import check_gather
from ..launch import bits_code, decode_block, decode_columns, rotation_operand, unit_dtype
from .unrotate import load_level_rows, rotated_to, unrotate_to
from .widths import row_bytes, unit_bytes


@triton.jit
def locate(
    block_table,
    row,
    rows,
    start,
    length,
    num_pages,
    table_stride,
    KV_HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
):
    """Chunk, token inside it, KV head and validity of each row of a ``[batch, KV_HEADS, length]`` result.

    A page outside the pages, as tables hold after the end of a sequence, is not read.
    """
    valid = row < rows
    position = start + row % length
    head = (row // length) % KV_HEADS
    entry = block_table + (row // (length * KV_HEADS)).to(tl.int64) * table_stride + position // PAGE_SIZE
    page = tl.load(entry, mask=valid, other=0).to(tl.int64)
    inside = valid & (page >= 0) & (page < num_pages)
    return tl.where(inside, page, 0) * KV_HEADS + head, position % PAGE_SIZE, head, inside


@triton.jit(
    do_not_specialize=["rows", "start", "length", "num_pages", "table_stride"],
    do_not_specialize_on_alignment=["block_table"],
)
def gather_kernel(
    units,  # the pages as units of the code rows
    scales,  # the pages as fp16
    block_table,
    center,
    signs,
    matrix,
    levels,
    out,  # [batch, KV_HEADS, length, D]
    rows,
    start,
    length,
    num_pages,
    table_stride,
    D: tl.constexpr,
    BITS: tl.constexpr,
    INT8: tl.constexpr,
    HAS_CENTER: tl.constexpr,
    ROTATED: tl.constexpr,
    WIDTH: tl.constexpr,
    CODE_OFFSET: tl.constexpr,
    SCALE_OFFSET: tl.constexpr,
    CHUNK_BYTES: tl.constexpr,
    KV_HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    UNIT_BYTES: tl.constexpr = unit_bytes(BITS)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    chunk, token, head, inside = locate(
        block_table, row, rows, start, length, num_pages, table_stride, KV_HEADS, PAGE_SIZE
    )
    source = units + chunk * (CHUNK_BYTES // UNIT_BYTES) + CODE_OFFSET // UNIT_BYTES
    level = load_level_rows(source + token * (row_bytes(D, BITS) // UNIT_BYTES), inside, levels, BITS, INT8, D)
    scale_at = scales + chunk * (CHUNK_BYTES // 2) + SCALE_OFFSET // 2 + token
    scale = tl.load(scale_at, mask=inside, other=0.0).to(tl.float32)
    target = out + row.to(tl.int64) * D
    if ROTATED:
        rotated_to(target, row < rows, level, scale, BITS, D)
    else:
        unrotate_to(target, center + head * D, row < rows, level, scale, matrix, signs, D, HAS_CENTER, WIDTH)


@triton.jit(
    do_not_specialize=["rows", "start", "length", "num_pages", "table_stride"],
    do_not_specialize_on_alignment=["block_table"],
)
def gather_raw_kernel(
    pages,  # in the dtype of out
    block_table,
    out,  # [batch, KV_HEADS, length, D]
    rows,
    start,
    length,
    num_pages,
    table_stride,
    D: tl.constexpr,
    OFFSET: tl.constexpr,
    CHUNK: tl.constexpr,
    KV_HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``OFFSET`` and ``CHUNK`` count elements."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    chunk, token, _, inside = locate(
        block_table, row, rows, start, length, num_pages, table_stride, KV_HEADS, PAGE_SIZE
    )
    d = tl.arange(0, triton.next_power_of_2(D))[None, :]
    source = pages + (chunk * CHUNK + OFFSET + token * D)[:, None] + d
    value = tl.load(source, mask=inside[:, None] & (d < D), other=0.0)
    tl.store(out + row.to(tl.int64)[:, None] * D + d, value, mask=(row < rows)[:, None] & (d < D))


def gather(
    pages: Tensor,
    block_table: Tensor,
    codec: CacheCodec,
    *,
    start: int,
    stop: int,
    dtype: torch.dtype,
    rotated: bool = False,
) -> Gathered:
    """:meth:`turboquant_core.KernelProvider.gather`: one launch for the keys, one for the values.

    Raises:
        ValueError: shapes, dtypes or devices do not fit the layout, or the range leaves the block table.
    """
    layout = codec.layout
    check_gather(pages, block_table, codec, start, stop, dtype)
    shape = (block_table.shape[0], layout.kv_heads, stop - start)
    keys = torch.empty((*shape, layout.key.head_dim), dtype=dtype, device=pages.device)
    values = torch.empty((*shape, layout.value.head_dim), dtype=dtype, device=pages.device)
    if keys.numel() == 0:
        return Gathered(keys, values)
    table = block_table if block_table.stride(1) == 1 else block_table.contiguous()
    _gather_packed(pages, table, codec.key, layout, keys, start, rotated, 0, layout.key_scale_offset)
    if codec.value is None:
        _gather_raw(pages, table, layout, values, start)
    else:
        offsets = layout.value_offset, layout.value_scale_offset
        _gather_packed(pages, table, codec.value, layout, values, start, rotated, *offsets)
    return Gathered(keys, values)


def _gather_packed(
    pages: Tensor,
    block_table: Tensor,
    codec: Codec,
    layout: PageLayout,
    out: Tensor,
    start: int,
    rotated: bool,
    code_offset: int,
    scale_offset: int,
) -> None:
    vector = codec.layout
    rows = out.numel() // vector.head_dim
    block = decode_block(rows, vector.head_dim, pages.device, rotated)
    gather_kernel[(-(-rows // block),)](
        pages.view(unit_dtype(vector)),
        pages.view(torch.float16),
        block_table,
        codec.signs if codec.center is None else codec.center,
        codec.signs,
        rotation_operand(vector.head_dim, vector.bits, pages.device),
        codec.levels,
        out,
        rows,
        start,
        out.shape[2],
        pages.shape[0],
        block_table.stride(0),
        D=vector.head_dim,
        BITS=bits_code(vector),
        INT8=vector.form == "int8",
        HAS_CENTER=codec.center is not None,
        ROTATED=rotated,
        WIDTH=decode_columns(vector.head_dim, block),
        CODE_OFFSET=code_offset,
        SCALE_OFFSET=scale_offset,
        CHUNK_BYTES=layout.chunk_bytes,
        KV_HEADS=layout.kv_heads,
        PAGE_SIZE=layout.page_size,
        BLOCK=block,
        num_warps=4,
    )


def _gather_raw(pages: Tensor, block_table: Tensor, layout: PageLayout, out: Tensor, start: int) -> None:
    rows = out.numel() // out.shape[-1]
    block = decode_block(rows, out.shape[-1], pages.device, rotated=True)
    gather_raw_kernel[(-(-rows // block),)](
        pages.view(out.dtype),
        block_table,
        out,
        rows,
        start,
        out.shape[2],
        pages.shape[0],
        block_table.stride(0),
        D=out.shape[-1],
        OFFSET=layout.value_offset // out.element_size(),
        CHUNK=layout.chunk_bytes // out.element_size(),
        KV_HEADS=layout.kv_heads,
        PAGE_SIZE=layout.page_size,
        BLOCK=block,
        num_warps=4,
    )
