"""Keys and values as they are into the exact rows of their pages, both in one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from turboquant_core import PageLayout
from turboquant_core.exact import exact_views

from ..device import multiprocessors
from ..exact_checks import check_store_exact
from ..launch import adjacent, launch_parameters
from .store import load_slots


@triton.jit
def copy_rows(
    x,
    rows_of_pages,
    slot_mapping,
    rows,
    slots,
    token_stride,
    head_stride,
    block,
    page_stride,
    chunk_stride,
    D: tl.constexpr,
    FIRST: tl.constexpr,
    RING: tl.constexpr,
    KV_HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copy tile number ``block`` of the rows; strides count elements."""
    d = tl.arange(0, triton.next_power_of_2(D))[None, :]
    row = block * BLOCK + tl.arange(0, BLOCK)
    chunk, offset, valid = load_slots(slot_mapping, row, rows, slots, KV_HEADS, PAGE_SIZE)
    page, head, token = chunk // KV_HEADS, row % KV_HEADS, row // KV_HEADS
    source = x + token.to(tl.int64) * token_stride + head.to(tl.int64) * head_stride
    value = tl.load(source[:, None] + d, mask=valid[:, None] & (d < D), other=0.0)
    target = rows_of_pages + page * page_stride + head * chunk_stride
    if FIRST:
        tl.store((target + offset * D)[:, None] + d, value, mask=(valid & (offset < FIRST))[:, None] & (d < D))
    if RING:
        # The token of this call that takes the row over, if there is one, is RING tokens later: only it may write.
        after = tl.load(slot_mapping + token + RING, mask=valid & (row + RING * KV_HEADS < rows), other=-1)
        overwritten = (offset + RING < PAGE_SIZE) & (after == page * PAGE_SIZE + offset + RING)
        place = (target + (FIRST + offset % RING) * D)[:, None] + d
        tl.store(place, value, mask=(valid & (overwritten == 0))[:, None] & (d < D))


@triton.jit(do_not_specialize=["rows", "slots"])
def store_exact_kernel(
    key,
    value,
    key_rows,  # exact keys [num_pages, KV_HEADS, FIRST + RING, D], strided
    value_rows,
    slot_mapping,
    rows,
    slots,
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    page_stride,
    chunk_stride,
    D: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    FIRST: tl.constexpr,
    RING: tl.constexpr,
    KV_HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0) // 2
    if tl.program_id(0) % 2 == 0:
        copy_rows(
            key, key_rows, slot_mapping, rows, slots, key_token_stride, key_head_stride, block,
            page_stride, chunk_stride, D, FIRST, RING, KV_HEADS, PAGE_SIZE, BLOCK,
        )  # fmt: skip
    else:
        copy_rows(
            value, value_rows, slot_mapping, rows, slots, value_token_stride, value_head_stride, block,
            page_stride, chunk_stride, VALUE_DIM, FIRST, RING, KV_HEADS, PAGE_SIZE, BLOCK,
        )  # fmt: skip


def store_exact(key: Tensor, value: Tensor, pages: Tensor, slot_mapping: Tensor, layout: PageLayout) -> None:
    """:meth:`turboquant_core.exact.ExactRowsProvider.store_exact` in one launch, without waiting for the device.

    Raises:
        ValueError: shapes, dtypes or devices do not fit the layout.
    """
    check_store_exact(key, value, pages, slot_mapping, layout)
    rows = key.shape[0] * layout.kv_heads
    if rows == 0 or layout.exact.rows == 0:
        return
    key_rows, value_rows = exact_views(pages, layout, key.dtype)
    key, value = adjacent(key), adjacent(value)
    config = launch_parameters(rows, multiprocessors(key.device))
    store_exact_kernel[(2 * -(-rows // config.block),)](
        key,
        value,
        key_rows,
        value_rows,
        slot_mapping.contiguous(),
        rows,
        pages.shape[0] * layout.page_size,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        key_rows.stride(0),
        key_rows.stride(1),
        D=layout.key.head_dim,
        VALUE_DIM=layout.value.head_dim,
        FIRST=layout.exact.first,
        RING=layout.exact.ring,
        KV_HEADS=layout.kv_heads,
        PAGE_SIZE=layout.page_size,
        BLOCK=config.block,
        num_warps=config.num_warps,
    )
