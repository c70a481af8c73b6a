"""Tiles of packed pages into shared memory by asynchronous copies, for one warp."""

from __future__ import annotations

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from .warp_layouts import (
    SCALE_COPY,
    SCALE_SHARED,
    copy_layout,
    group_layout,
    row_shared_layout,
    scale_group_layout,
    tile_rows,
)
from .widths import row_bytes

# Triton 3.6 knows it by its older name.
copy_in = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared


@triton.constexpr_function
def front_bytes(head_dim, bits):
    """Bytes of a row that one tile takes: all, at 3 bits two of the three planes."""
    return head_dim // 4 if bits == 3 else row_bytes(head_dim, bits)


@triton.constexpr_function
def code_layout(head_dim, bits, itemsize, page_size, block):
    """How the code rows of a tile are copied."""
    return copy_layout(front_bytes(head_dim, bits), itemsize, block, bits == 3, page_size % block != 0)


@triton.constexpr_function
def code_groups(head_dim, bits, page_size, block):
    """The groups of tokens of a tile as :func:`code_layout` has them."""
    return group_layout(front_bytes(head_dim, bits), block, bits == 3, page_size % block != 0)


@gluon.jit
def group_pages(table, tile, end, GROUPS: gl.constexpr, PAGE_SIZE: gl.constexpr, BLOCK: gl.constexpr):
    """Pages ``[8]`` of the groups of tokens of a tile; 0 beyond the sequence."""
    group = gl.arange(0, 8, layout=gl.SliceLayout(0, GROUPS))
    here = tile * BLOCK + (BLOCK // 8) * group
    return gl.load(table + here // PAGE_SIZE, mask=here < end, other=0).to(gl.int64)


@gluon.jit
def tile_pages(
    table, tile, last, end,
    D: gl.constexpr, VALUE_DIM: gl.constexpr, KEY_BITS: gl.constexpr, VALUE_BITS: gl.constexpr,
    PAGE_SIZE: gl.constexpr, BLOCK: gl.constexpr,
):  # fmt: skip
    """Pages of a tile for the copies of keys, of values and of scales: int64, ``[8]`` where a tile spans pages."""
    if PAGE_SIZE % BLOCK == 0:
        page = gl.load(table + gl.minimum(tile, last - 1) * BLOCK // PAGE_SIZE).to(gl.int64)
        return page, page, page
    else:
        return (
            group_pages(table, tile, end, code_groups(D, KEY_BITS, PAGE_SIZE, BLOCK), PAGE_SIZE, BLOCK),
            group_pages(table, tile, end, code_groups(VALUE_DIM, VALUE_BITS, PAGE_SIZE, BLOCK), PAGE_SIZE, BLOCK),
            group_pages(table, tile, end, scale_group_layout(BLOCK), PAGE_SIZE, BLOCK),
        )


@gluon.jit
def tile_offsets(
    page, page_stride, tile,
    START: gl.constexpr, ROW: gl.constexpr, GROUPS: gl.constexpr, PAGE_SIZE: gl.constexpr, BLOCK: gl.constexpr,
):  # fmt: skip
    """Where the entries (``ROW`` bytes each, from ``START`` on) of groups of tokens begin: a number, and ``[8]``."""
    group = gl.arange(0, 8, layout=gl.SliceLayout(0, GROUPS))
    if PAGE_SIZE % BLOCK == 0:
        return page * page_stride + (START + ((tile * BLOCK) % PAGE_SIZE) * ROW), group * (BLOCK // 8 * ROW)
    else:
        slot = (tile * BLOCK + (BLOCK // 8) * group) % PAGE_SIZE
        return 0, page * page_stride + (START + slot * ROW)


@gluon.jit
def plane_entries(row, column, ROW: gl.constexpr, PLANE: gl.constexpr, RUN: gl.constexpr, BLOCK: gl.constexpr):
    """Entries of 3-bit code rows in a tile of halves, and which are read.

    Runs of ``RUN`` entries of the first two planes take turns; the second halves have the third plane, and nothing.
    """
    plane = (2 * (row // BLOCK))[:, None] + ((column % (2 * RUN)) // RUN)[None, :]
    inside = (column // (2 * RUN)) * RUN + column % RUN
    entry = ((row % BLOCK) >> 3)[:, None] * ROW + plane * PLANE + inside[None, :]
    return gl.multiple_of(gl.max_contiguous(entry, [1, RUN]), [1, RUN]), gl.max_constancy(plane < 3, [1, RUN])


@gluon.jit
def copy_rows(
    shared, chunk_base, page, page_stride, tile, enabled,
    START: gl.constexpr, D: gl.constexpr, BITS: gl.constexpr, TYPE: gl.constexpr,
    PAGE_SIZE: gl.constexpr, BLOCK: gl.constexpr,
):  # fmt: skip
    """Start copying the code rows of a tile; at 3 bits in halves (:func:`plane_entries`)."""
    ITEM: gl.constexpr = TYPE.primitive_bitwidth // 8
    ROW: gl.constexpr = row_bytes(D, BITS)
    LAYOUT: gl.constexpr = code_layout(D, BITS, ITEM, PAGE_SIZE, BLOCK)
    GROUPS: gl.constexpr = code_groups(D, BITS, PAGE_SIZE, BLOCK)
    ROWS: gl.constexpr = tile_rows(BLOCK, BITS == 3)
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    column = gl.arange(0, front_bytes(D, BITS) // ITEM, layout=gl.SliceLayout(0, LAYOUT))
    base, offset = tile_offsets(page, page_stride, tile, START, ROW, GROUPS, PAGE_SIZE, BLOCK)
    offset = gl.reshape(offset[None, :].broadcast_to([ROWS // 8, 8]), [ROWS])
    offset = gl.multiple_of(gl.convert_layout(offset, gl.SliceLayout(1, LAYOUT), assert_trivial=True), 16)
    pointer = ((chunk_base + base) + offset).to(gl.pointer_type(TYPE))[:, None]
    # What is known at compile time comes last, so that it becomes part of the instruction.
    if BITS == 3:
        entry, read = plane_entries(row, column, ROW // ITEM, D // 8 // ITEM, 16 // ITEM, BLOCK)
        copy_in(shared, pointer + entry, mask=read & enabled)
    else:
        copy_in(shared, pointer + column[None, :] + ((row >> 3) * (ROW // ITEM))[:, None], mask=enabled)


@gluon.jit
def copy_scales(
    shared, chunk_base, page, page_stride, tile, enabled,
    START: gl.constexpr, PAGE_SIZE: gl.constexpr, BLOCK: gl.constexpr,
):  # fmt: skip
    """Start copying the fp16 scales of a tile, by pairs: a copy has four bytes at least."""
    pair = gl.arange(0, BLOCK // 16, layout=gl.SliceLayout(0, SCALE_COPY))
    base, offset = tile_offsets(page, page_stride, tile, START, 2, scale_group_layout(BLOCK), PAGE_SIZE, BLOCK)
    offset = gl.multiple_of(gl.convert_layout(offset, gl.SliceLayout(1, SCALE_COPY), assert_trivial=True), 4)
    pointer = ((chunk_base + base) + offset).to(gl.pointer_type(gl.int32))[:, None] + pair[None, :]
    copy_in(shared, pointer, mask=enabled)


@gluon.jit
def copy_codes(
    tiles, chunk_base, page, scale_page, page_stride, tile, last,
    START: gl.constexpr, SCALE: gl.constexpr, D: gl.constexpr, BITS: gl.constexpr, TYPE: gl.constexpr,
    PAGE_SIZE: gl.constexpr, BLOCK: gl.constexpr,
):  # fmt: skip
    """Start copying a tile's codes and scales, if it is before ``last``: one group of copies."""
    codes, scales = tiles
    on = tile < last
    copy_rows(codes, chunk_base, page, page_stride, tile, on, START, D, BITS, TYPE, PAGE_SIZE, BLOCK)
    copy_scales(scales, chunk_base, scale_page, page_stride, tile, on, SCALE, PAGE_SIZE, BLOCK)
    async_copy.commit_group()


@gluon.jit
def copy_keys(
    tiles, source, pages, tile, last,
    D: gl.constexpr, VALUE_DIM: gl.constexpr, KEY_BITS: gl.constexpr, VALUE_BITS: gl.constexpr,
    PAGE_SIZE: gl.constexpr, BLOCK: gl.constexpr,
):  # fmt: skip
    """:func:`copy_codes` of keys."""
    chunk_base, page_stride, _ = source
    SCALE: gl.constexpr = PAGE_SIZE * (row_bytes(D, KEY_BITS) + row_bytes(VALUE_DIM, VALUE_BITS))
    copy_codes(
        tiles, chunk_base, pages[0], pages[2], page_stride, tile, last,
        0, SCALE, D, KEY_BITS, gl.int8, PAGE_SIZE, BLOCK,
    )  # fmt: skip


@gluon.jit
def copy_values(
    tiles, source, pages, tile, last,
    D: gl.constexpr, VALUE_DIM: gl.constexpr, KEY_BITS: gl.constexpr, VALUE_BITS: gl.constexpr,
    PAGE_SIZE: gl.constexpr, BLOCK: gl.constexpr,
):  # fmt: skip
    """:func:`copy_codes` of values."""
    chunk_base, page_stride, _ = source
    START: gl.constexpr = PAGE_SIZE * row_bytes(D, KEY_BITS)
    SCALE: gl.constexpr = START + PAGE_SIZE * row_bytes(VALUE_DIM, VALUE_BITS) + PAGE_SIZE * 2
    copy_codes(
        tiles, chunk_base, pages[1], pages[2], page_stride, tile, last,
        START, SCALE, VALUE_DIM, VALUE_BITS, gl.int16, PAGE_SIZE, BLOCK,
    )  # fmt: skip


@gluon.jit
def allocate_tile(D: gl.constexpr, BITS: gl.constexpr, TYPE: gl.constexpr, BLOCK: gl.constexpr):
    """Shared memory of a tile: codes, at 3 bits in two halves (:func:`plane_entries`), and scales."""
    ITEM: gl.constexpr = TYPE.primitive_bitwidth // 8
    WIDTH: gl.constexpr = front_bytes(D, BITS)
    ROWS: gl.constexpr = tile_rows(BLOCK, BITS == 3)
    codes = gl.allocate_shared_memory(TYPE, [ROWS, WIDTH // ITEM], row_shared_layout(WIDTH, ITEM))
    return codes, gl.allocate_shared_memory(gl.int32, [8, BLOCK // 16], SCALE_SHARED)


@gluon.jit
def code_halves(codes, BITS: gl.constexpr, BLOCK: gl.constexpr):
    """The tiles of the first two planes and of the third; at 2 and 4 bits the only one, twice."""
    if BITS == 3:
        return codes.slice(0, BLOCK, 0), codes.slice(BLOCK, BLOCK, 0)
    else:
        return codes, codes
