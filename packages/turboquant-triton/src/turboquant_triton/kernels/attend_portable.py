"""Attention over packed pages in plain Triton: any GPU with a Triton back end, and the interpreter."""

from __future__ import annotations

import triton
import triton.language as tl

from .attend_plan import load_piece
from .codes import load_entries
from .widths import row_bytes

NEVER = tl.constexpr(-1.0e30)


@triton.jit
def load_vectors(rows, valid, levels, BITS: tl.constexpr, INT8: tl.constexpr, D: tl.constexpr):
    """Levels of the code rows at ``rows`` (pointers to uint8): float32 ``[tokens, padded D]``, padding zero."""
    d = tl.arange(0, triton.next_power_of_2(D))
    mask = valid[:, None] & (d < D)[None, :]
    entry = load_entries(rows[:, None], d[None, :], mask, BITS, INT8, D)
    return tl.load(levels + entry, mask=mask, other=0.0)


@triton.jit(do_not_specialize=["rows", "block_table_stride", "window"])
def attend_portable_kernel(
    query,  # float32 [items, N, D], rotated, times scaling and log2(e)
    pages,
    block_table,
    plan,
    partial,
    stats,
    key_levels,  # float32 [2 ** KEY_BITS], of two widths one after the other
    value_levels,
    rows,
    block_table_stride,
    page_stride,
    softcap_log2,
    window,
    D: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    KEY_INT8: tl.constexpr,
    VALUE_INT8: tl.constexpr,
    RAW_TYPE: tl.constexpr,
    RAW_BITS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    EXACT_BYTES: tl.constexpr,
    KV_HEADS: tl.constexpr,
    CHUNKS: tl.constexpr,
    GROUP: tl.constexpr,
    Q_LEN: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    ROWS_BLOCK: tl.constexpr,
):
    KEY_ROW: tl.constexpr = row_bytes(D, KEY_BITS)
    VALUE_ROW: tl.constexpr = VALUE_DIM * RAW_BITS // 8 if RAW_BITS else row_bytes(VALUE_DIM, VALUE_BITS)
    VALUE_OFFSET: tl.constexpr = PAGE_SIZE * KEY_ROW
    KEY_SCALE_OFFSET: tl.constexpr = VALUE_OFFSET + PAGE_SIZE * VALUE_ROW
    VALUE_SCALE_OFFSET: tl.constexpr = KEY_SCALE_OFFSET + PAGE_SIZE * 2
    CHUNK_BYTES: tl.constexpr = VALUE_SCALE_OFFSET + (0 if RAW_BITS else PAGE_SIZE * 2) + EXACT_BYTES
    program = tl.program_id(0)
    total = tl.load(plan + rows - 1)
    share = tl.maximum(tl.cdiv(total, tl.num_programs(0)), 1)
    tile = program * share
    stop = tl.minimum(tile + share, total)
    n = tl.arange(0, N)
    d = tl.arange(0, triton.next_power_of_2(D))
    value_d = tl.arange(0, triton.next_power_of_2(VALUE_DIM))
    while tile < stop:
        piece = load_piece(plan, rows, tile, stop, KV_HEADS * CHUNKS, ROWS_BLOCK)
        batch, item, first, last, start, end = piece
        kv_head = (item // CHUNKS) % KV_HEADS
        flat = (item % CHUNKS) * N + n
        q = tl.load(
            query + (item.to(tl.int64) * N + n)[:, None] * D + d[None, :],
            mask=(flat < Q_LEN * GROUP)[:, None] & (d < D)[None, :],
            other=0.0,
        )
        position = end - Q_LEN + flat // GROUP
        maximum = tl.full((N,), NEVER, tl.float32)
        total_weight = tl.zeros((N,), tl.float32)
        output = tl.zeros((N, triton.next_power_of_2(VALUE_DIM)), tl.float32)
        table = block_table + batch.to(tl.int64) * block_table_stride
        for i in range(first, last):
            here = i * BLOCK + tl.arange(0, BLOCK)
            seen = (here < end) & (here >= start)
            page = tl.load(table + here // PAGE_SIZE, mask=seen, other=0).to(tl.int64)
            base = pages + page * page_stride + kv_head * CHUNK_BYTES
            slot = here % PAGE_SIZE
            key = load_vectors(base + slot * KEY_ROW, seen, key_levels, KEY_BITS, KEY_INT8, D)
            key_scales = (base + KEY_SCALE_OFFSET + slot * 2).to(tl.pointer_type(tl.float16))
            key_scale = tl.load(key_scales, mask=seen, other=0.0).to(tl.float32)
            score = tl.dot(q, tl.trans(key), input_precision="ieee") * key_scale[None, :]
            if HAS_SOFTCAP:
                # tanh(x) = 1 - 2 / (exp(2 x) + 1), with x = score / softcap in natural units.
                score = softcap_log2 - 2 * softcap_log2 / (
                    tl.exp2(score * (2.0 * 1.4426950408889634 / softcap_log2)) + 1
                )
            visible = seen[None, :] & (here[None, :] <= position[:, None])
            if HAS_WINDOW:
                visible = visible & (here[None, :] > position[:, None] - window)
            score = tl.where(visible, score, NEVER)
            maximum_now = tl.maximum(maximum, tl.max(score, 1))
            decay = tl.exp2(maximum - maximum_now)
            weight = tl.where(visible, tl.exp2(score - maximum_now[:, None]), 0.0)
            total_weight = total_weight * decay + tl.sum(weight, 1)
            maximum = maximum_now
            if RAW_BITS:
                value_rows = (base + VALUE_OFFSET + slot * VALUE_ROW).to(tl.pointer_type(RAW_TYPE))
                value = tl.load(
                    value_rows[:, None] + value_d[None, :],
                    mask=seen[:, None] & (value_d < VALUE_DIM)[None, :],
                    other=0.0,
                ).to(tl.float32)
            else:
                value = load_vectors(
                    base + VALUE_OFFSET + slot * VALUE_ROW, seen, value_levels, VALUE_BITS, VALUE_INT8, VALUE_DIM
                )
                value_scales = (base + VALUE_SCALE_OFFSET + slot * 2).to(tl.pointer_type(tl.float16))
                value *= tl.load(value_scales, mask=seen, other=0.0).to(tl.float32)[:, None]
            output = tl.dot(weight, value, output * decay[:, None], input_precision="ieee")
        target = (item + program).to(tl.int64) * N + n
        tl.store(
            partial + target[:, None] * VALUE_DIM + value_d[None, :],
            output,
            mask=(n < N)[:, None] & (value_d < VALUE_DIM)[None, :],
        )
        tl.store(stats + (item + program).to(tl.int64) * 2 * N + n, maximum)
        tl.store(stats + (item + program).to(tl.int64) * 2 * N + N + n, total_weight)
        tile += last - first
