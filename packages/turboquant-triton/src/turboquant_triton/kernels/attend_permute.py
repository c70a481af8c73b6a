"""Attention over packed pages with keys and values unpacked in registers (NVIDIA GPUs from sm_80)."""

from __future__ import annotations

import triton
import triton.language as tl

from .attend_operands import add_values, key_scores, query_operands, store_output, zero_output
from .attend_plan import load_piece
from .widths import row_bytes

# exp2(-24) is the smallest positive fp16: every stored scale but zero is at least that.
SMALLEST_SCALE = tl.constexpr(2.0**-24)
# Weights reach the value product as fp16 in 0 .. 2**15, so that small ones keep their bits.
WEIGHT_SHIFT = tl.constexpr(2.0**15)
NEVER = tl.constexpr(-1.0e30)


@triton.jit
def log2_approx(x):
    """Base-2 logarithm of positive normal numbers to 22 bits, in one instruction."""
    return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def load_pages(table, base, stop, PAGE_SIZE: tl.constexpr, BLOCK: tl.constexpr, TABLE: tl.constexpr):
    """Pages of the tiles ``base .. base + TABLE - 1``, when a tile lies in one page: int32 ``[TABLE]``."""
    tile = base + tl.arange(0, TABLE)
    return tl.load(table + (tile * BLOCK) // PAGE_SIZE, mask=(tile < stop) & (PAGE_SIZE % BLOCK == 0), other=0)


@triton.jit
def tile_page(pages, table, base, tile, token, end, PAGE_SIZE: tl.constexpr, BLOCK: tl.constexpr, TABLE: tl.constexpr):
    """Page of a tile, or of each of its tokens when a tile spans several pages.

    The first is picked from registers: a load here would make every copy of keys and values wait for the copies
    before it, since asynchronous copies complete in order.
    """
    if PAGE_SIZE % BLOCK == 0:
        return tl.sum(tl.where(tl.arange(0, TABLE) == tile - base, pages, 0), 0)
    else:
        here = tile * BLOCK + token
        return tl.load(table + here // PAGE_SIZE, mask=here < end, other=0)


@triton.jit
def token_pointers(
    chunk_base,
    page,
    page_stride,
    tile,
    token,
    OFFSET: tl.constexpr,
    ROW: tl.constexpr,
    TYPE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Pointers to the entries, ``ROW`` bytes each from ``OFFSET`` on, of the tokens of a tile."""
    base = chunk_base + page.to(tl.int64) * page_stride
    if PAGE_SIZE % BLOCK == 0:
        inside = (tile * BLOCK) % PAGE_SIZE
        return (base + OFFSET + inside * ROW).to(tl.pointer_type(TYPE)) + token * (
            ROW // (TYPE.primitive_bitwidth // 8)
        )
    else:
        slot = (tile * BLOCK + token) % PAGE_SIZE
        return (base + OFFSET + slot * ROW).to(tl.pointer_type(TYPE))


@triton.jit
def load_scales(
    chunk_base,
    page,
    page_stride,
    tile,
    OFFSET: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """fp16 scales of the tokens of a tile; ``page`` as :func:`tile_page` gives it for every second token.

    Loaded by pairs: single ones are too narrow for asynchronous copies, and an ordinary load in the loop makes
    instructions wait that merely share its scoreboard.
    """
    pair = tl.arange(0, BLOCK // 2)
    if PAGE_SIZE % BLOCK == 0:
        rows = token_pointers(
            chunk_base, page, page_stride, tile, pair, OFFSET, 4, tl.int32, PAGE_SIZE // 2, BLOCK // 2
        )
    else:
        slot = (tile * BLOCK + 2 * pair) % PAGE_SIZE
        rows = (chunk_base + page.to(tl.int64) * page_stride + OFFSET + slot * 2).to(tl.pointer_type(tl.int32))
    # Not joined from two halves: behind a join, Triton 3.6 takes the weights for 8 bits wide, and gives the value
    # operand another register order.
    both = tl.broadcast_to(tl.load(rows)[:, None], (BLOCK // 2, 2))
    half = (both >> (16 * tl.arange(0, 2))[None, :]).to(tl.int16).to(tl.float16, bitcast=True)
    return tl.reshape(half, (BLOCK,))


@triton.jit(do_not_specialize=["rows", "block_table_stride", "window"])
def attend_permute_kernel(
    query,  # int8 [items, N, D], rotated
    query_stats,  # float32 [items, 2, N]: multiplier and offset of the int8 scores, base-2 logarithm units
    pages,  # uint8 [num_pages, KV_HEADS, chunk_bytes], as int8
    block_table,  # int32 [batch, block_table_stride]
    plan,  # int32, see attend_plan
    partial,  # float32 [items + programs, N, VALUE_DIM]
    stats,  # float32 [items + programs, 2, N]: running maximum and sum
    rows,
    block_table_stride,
    page_stride,
    softcap_log2,
    window,
    D: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    RAW_TYPE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    EXACT_BYTES: tl.constexpr,
    KV_HEADS: tl.constexpr,
    CHUNKS: tl.constexpr,
    GROUP: tl.constexpr,
    Q_LEN: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    ROWS_BLOCK: tl.constexpr,
    TABLE: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    KEY_ROW: tl.constexpr = row_bytes(D, KEY_BITS)
    VALUE_ROW: tl.constexpr = row_bytes(VALUE_DIM, VALUE_BITS)
    VALUE_OFFSET: tl.constexpr = PAGE_SIZE * KEY_ROW
    KEY_SCALE_OFFSET: tl.constexpr = VALUE_OFFSET + PAGE_SIZE * VALUE_ROW
    VALUE_SCALE_OFFSET: tl.constexpr = KEY_SCALE_OFFSET + PAGE_SIZE * 2
    CHUNK_BYTES: tl.constexpr = VALUE_SCALE_OFFSET + (0 if VALUE_BITS == 16 else PAGE_SIZE * 2) + EXACT_BYTES
    VALUE_TYPE: tl.constexpr = RAW_TYPE if VALUE_BITS == 16 else tl.int16
    program = tl.program_id(0)
    total = tl.load(plan + rows - 1)
    share = tl.maximum(tl.cdiv(total, tl.num_programs(0)), 1)
    tile = program * share
    stop = tl.minimum(tile + share, total)
    token = tl.arange(0, BLOCK)
    pair = tl.arange(0, BLOCK // 2)
    n = tl.arange(0, N)
    while tile < stop:
        piece = load_piece(plan, rows, tile, stop, KV_HEADS * CHUNKS, ROWS_BLOCK)
        batch, item, first, last, start, end = piece
        kv_head = (item // CHUNKS) % KV_HEADS
        chunk = item % CHUNKS
        q = query_operands(query + item.to(tl.int64) * N * D, KEY_BITS, N, D)
        multiplier = tl.load(query_stats + item * 2 * N + n)
        offset = tl.load(query_stats + item * 2 * N + N + n)
        position = end - Q_LEN + (chunk * N + n) // GROUP
        maximum = tl.full((N,), NEVER, tl.float32)
        total_weight = tl.zeros((N,), tl.float32)
        output = zero_output(VALUE_BITS, N, VALUE_DIM)
        table = block_table + batch.to(tl.int64) * block_table_stride
        chunk_base = pages + kv_head * CHUNK_BYTES
        for base in range(first, last, TABLE):
            stop_here = tl.minimum(base + TABLE, last)
            pages_here = load_pages(table, base, stop_here, PAGE_SIZE, BLOCK, TABLE)
            for i in range(base, stop_here):
                here = i * BLOCK + token
                page = tile_page(pages_here, table, base, i, token, end, PAGE_SIZE, BLOCK, TABLE)
                pair_page = tile_page(pages_here, table, base, i, 2 * pair, end, PAGE_SIZE, BLOCK, TABLE)
                key_scale = load_scales(chunk_base, pair_page, page_stride, i, KEY_SCALE_OFFSET, PAGE_SIZE, BLOCK)
                key_rows = token_pointers(
                    chunk_base, page, page_stride, i, token, 0, KEY_ROW, tl.int8, PAGE_SIZE, BLOCK
                )
                value_rows = token_pointers(
                    chunk_base, page, page_stride, i, token, VALUE_OFFSET, VALUE_ROW, VALUE_TYPE, PAGE_SIZE, BLOCK
                )
                score = key_scores(key_rows, q, KEY_BITS, D)
                score = (score * multiplier[None, :] + offset[None, :]) * key_scale.to(tl.float32)[:, None]
                if HAS_SOFTCAP:
                    # tanh(x) = 1 - 2 / (exp(2 x) + 1), with x = score / softcap in natural units.
                    score = softcap_log2 - 2 * softcap_log2 / (
                        tl.exp2(score * (2.0 * 1.4426950408889634 / softcap_log2)) + 1
                    )
                visible = (here < end)[:, None]
                if HAS_STARTS:
                    visible = visible & (here >= start)[:, None]
                if Q_LEN > 1:
                    visible = visible & (here[:, None] <= position[None, :])
                if HAS_WINDOW:
                    visible = visible & (here[:, None] > position[None, :] - window)
                score = tl.where(visible, score, NEVER)
                if VALUE_BITS == 16:
                    lift = score
                else:
                    value_scale = load_scales(
                        chunk_base, pair_page, page_stride, i, VALUE_SCALE_OFFSET, PAGE_SIZE, BLOCK
                    )
                    seen_scale = tl.where(here < end, value_scale.to(tl.float32), 0.0)
                    lift = score + log2_approx(tl.maximum(seen_scale, SMALLEST_SCALE))[:, None]
                maximum_now = tl.maximum(maximum, tl.max(lift, 0))
                decay = tl.exp2(maximum - maximum_now)
                weight = tl.exp2(score - maximum_now[None, :])
                if HAS_STARTS or Q_LEN > 1 or HAS_WINDOW:
                    # Only here can a query see nothing of a tile, with a maximum that is still NEVER.
                    weight = tl.where(visible, weight, 0.0)
                total_weight = total_weight * decay + tl.sum(weight, 0)
                maximum = maximum_now
                if VALUE_BITS == 16:
                    shifted = weight
                else:
                    shifted = (weight * (seen_scale * WEIGHT_SHIFT)[:, None]).to(tl.float16)
                output = add_values(output, value_rows, here < end, shifted, decay[None, :], VALUE_BITS, VALUE_DIM)
        slot_out = (item + program).to(tl.int64)
        store_output(partial + slot_out * N * VALUE_DIM, output, VALUE_BITS, N, VALUE_DIM)
        tl.store(stats + slot_out * 2 * N + n, maximum)
        tl.store(stats + slot_out * 2 * N + N + n, total_weight)
        tile += last - first
