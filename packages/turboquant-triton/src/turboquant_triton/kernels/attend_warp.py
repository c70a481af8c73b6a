"""Attention over packed pages by single warps, every register layout given (NVIDIA GPUs from sm_80).

What :mod:`turboquant_triton.kernels.attend_permute` does, for codes of one width: nothing but tiles passes through
shared memory, and no warp waits for another. There is room for one tile of keys and one of values: as soon as the keys
of a tile are multiplied, those of the next are copied while the values are at work, and the other way round.
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from .warp_copies import allocate_tile, code_halves, copy_keys, copy_values, tile_pages
from .warp_layouts import LANES, PRODUCT, token_layout
from .warp_operands import (
    add_values,
    key_product,
    lookup_tables,
    query_tiles,
    store_output,
    weight_operand,
    zero_output,
)

# An integer below 2**22 plus these bits, read as a float, is the integer plus MAGIC.
MAGIC_BITS = tl.constexpr(0x4B400000)
MAGIC = tl.constexpr(12582912.0)
NEVER = tl.constexpr(-1.0e30)
SMALLEST_SCALE = tl.constexpr(2.0**-24)
# Keeps products with a score of NEVER far from 0.
SMALLEST_MULTIPLIER = tl.constexpr(1.0e-20)
EXPONENT = tl.constexpr(0x7F800000)
# Bits of 2**14 / x are these minus the bits of x, a power of two; int32.
WEIGHT_BITS = tl.constexpr((268 << 23) - (1 << 32))
WEIGHT_UNIT = tl.constexpr(2.0**-14)
HALVES = tl.constexpr("{ .reg .f16 a, b; mov.b32 {a, b}, $2; cvt.f32.f16 $0, a; cvt.f32.f16 $1, b; }")
WAIT = tl.constexpr("griddepcontrol.wait; // $0")
LAUNCH = tl.constexpr("griddepcontrol.launch_dependents; // $0")


@gluon.jit
def load_piece(plan, rows, tile, stop, ITEMS_PER_ROW: gl.constexpr, ROWS_BLOCK: gl.constexpr):
    """The piece that begins at ``tile``, as :func:`turboquant_triton.kernels.attend_plan.load_piece` gives it."""
    row = 0
    for base in range(0, rows, ROWS_BLOCK):
        index = base + gl.arange(0, ROWS_BLOCK, layout=LANES)
        ends = gl.load(plan + index, mask=index < rows, other=2147483647)
        row += gl.sum((ends <= tile).to(gl.int32), 0)
    before = gl.load(plan + row - 1, mask=row > 0, other=0)
    tiles = (gl.load(plan + row) - before) // ITEMS_PER_ROW
    local = tile - before
    skipped = gl.load(plan + 2 * rows + row)
    first = local % tiles
    return (
        gl.load(plan + rows + row),
        row * ITEMS_PER_ROW + local // tiles,
        skipped + first,
        skipped + gl.minimum(tiles, first + stop - tile),
        gl.load(plan + 3 * rows + row),
        gl.load(plan + 4 * rows + row),
    )


@gluon.jit
def load_scales(shared, BLOCK: gl.constexpr):
    """float32 scales ``[8, BLOCK / 8]`` of (group, inside)."""
    pairs = shared.load(token_layout(BLOCK, 2))
    even, odd = gl.inline_asm_elementwise(
        HALVES, "=f,=f,r", [pairs], dtype=(gl.float32, gl.float32), is_pure=True, pack=1
    )
    scales = gl.reshape(gl.join(even, odd), [8, BLOCK // 8])
    return gl.convert_layout(scales, token_layout(BLOCK, 1), assert_trivial=True)


@gluon.jit
def by_rows(x, BLOCK: gl.constexpr, N: gl.constexpr):
    """``[8, BLOCK / 8]`` of (group, inside) as ``[BLOCK, N]`` in the order of a tile's rows."""
    rows = gl.reshape(gl.permute(x, (1, 0)), [BLOCK])
    rows = gl.convert_layout(rows, gl.SliceLayout(1, PRODUCT), assert_trivial=True)
    return rows[:, None].broadcast_to([BLOCK, N])


@gluon.jit
def tile_tokens(tile, BLOCK: gl.constexpr):
    """Tokens of a tile, ``[8, BLOCK / 8]`` of (group, inside)."""
    TOKENS: gl.constexpr = token_layout(BLOCK, 1)
    group = gl.arange(0, 8, layout=gl.SliceLayout(1, TOKENS))
    inside = gl.arange(0, BLOCK // 8, layout=gl.SliceLayout(0, TOKENS))
    return (tile * BLOCK + (BLOCK // 8) * group)[:, None] + inside[None, :]


@gluon.jit
def capped(score, softcap_log2):
    """``softcap * tanh(score / softcap)`` in base-2 units, as ``1 - 2 / (exp(2 x) + 1)``."""
    power = gl.exp2(score * (2.0 * 1.4426950408889634 / softcap_log2))
    return softcap_log2 - 2 * softcap_log2 / (power + 1)


@gluon.jit
def visible_tokens(
    here, position, start, end, window, HAS_STARTS: gl.constexpr, HAS_WINDOW: gl.constexpr, Q_LEN: gl.constexpr
):
    """bool ``[BLOCK, N]``: which of the tokens ``here`` each query sees."""
    visible = here < end
    if HAS_STARTS:
        visible = visible & (here >= start)
    if Q_LEN > 1:
        visible = visible & (here <= position)
    if HAS_WINDOW:
        visible = visible & (here > position - window)
    return visible


@gluon.jit
def lifted(weight, value_scale, unit, BLOCK: gl.constexpr, N: gl.constexpr):
    """Weights times value scales as fp16 below 2**15, and the power of two that they are to be multiplied with.

    The power of two is that of the largest scale so far, so that small weights keep their bits whatever the scales are.
    """
    largest = gl.maximum(gl.max(gl.max(value_scale, 1), 0), unit)
    unit_now = (largest.to(gl.int32, bitcast=True) & EXPONENT).to(gl.float32, bitcast=True)
    inverse = (WEIGHT_BITS - unit_now.to(gl.int32, bitcast=True)).to(gl.float32, bitcast=True)
    return (weight * by_rows(value_scale * inverse, BLOCK, N)).to(gl.float16), unit_now, unit * inverse * WEIGHT_UNIT


@gluon.jit
def tile_scores(
    tiles, query, written, KEY_BITS: gl.constexpr, N: gl.constexpr, BLOCK: gl.constexpr, MASKED: gl.constexpr
):
    """float32 ``[BLOCK, N]``: scores of a tile of keys over the queries' multipliers; NEVER where not ``written``."""
    q, tables, initial, _, _ = query
    codes, scales = tiles
    front, back = code_halves(codes, KEY_BITS, BLOCK)
    scale = load_scales(scales, BLOCK)
    bias = scale * -MAGIC
    if MASKED:
        # What lies beyond a sequence may be NaN.
        scale = gl.where(written, scale, 0.0)
        bias = gl.where(written, bias, NEVER)
    product = key_product(front, back, q, tables, initial, KEY_BITS).to(gl.float32, bitcast=True)
    return gl.fma(product, by_rows(scale, BLOCK, N), by_rows(bias, BLOCK, N))


@gluon.jit
def step(
    state, shared, source, query, pages, tile, last, limits, softcap_log2, window,
    D: gl.constexpr, VALUE_DIM: gl.constexpr, KEY_BITS: gl.constexpr, VALUE_BITS: gl.constexpr, N: gl.constexpr,
    PAGE_SIZE: gl.constexpr, BLOCK: gl.constexpr, Q_LEN: gl.constexpr,
    HAS_STARTS: gl.constexpr, HAS_WINDOW: gl.constexpr, HAS_SOFTCAP: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Add a tile to ``state`` (maximum, sums of weights, unit of the scales, output), and start copying the next."""
    maximum, weights, unit, output = state
    keys, values = shared
    multiplier, position = query[3], query[4]
    start, end = limits
    here = tile_tokens(tile, BLOCK)
    written = (here < end) & (here >= start) if HAS_STARTS else here < end
    async_copy.wait_group(1)
    score = tile_scores(keys, query, written, KEY_BITS, N, BLOCK, MASKED)
    copy_keys(keys, source, pages, tile + 1, last, D, VALUE_DIM, KEY_BITS, VALUE_BITS, PAGE_SIZE, BLOCK)
    PARTIAL: gl.constexpr = HAS_STARTS or HAS_WINDOW or Q_LEN > 1
    if HAS_SOFTCAP:
        score = capped(score * multiplier[None, :], softcap_log2)
        multiplier = gl.full([N], 1.0, gl.float32, layout=gl.SliceLayout(0, PRODUCT))
    if MASKED and (PARTIAL or HAS_SOFTCAP):
        tokens = by_rows(here, BLOCK, N)
        visible = visible_tokens(tokens, position[None, :], start, end, window, HAS_STARTS, HAS_WINDOW, Q_LEN)
        score = gl.where(visible, score, NEVER)
    maximum_now = gl.maximum(maximum, gl.max(score, 0))
    decay = gl.exp2((maximum - maximum_now) * multiplier)
    lowered = (-maximum_now * multiplier)[None, :].broadcast_to([BLOCK, N])
    weight = gl.exp2(gl.fma(score, multiplier[None, :].broadcast_to([BLOCK, N]), lowered))
    if MASKED and PARTIAL:
        # Only here can a query see nothing of a tile, with a maximum that is still NEVER.
        weight = gl.where(visible, weight, 0.0)
    weights_decay = gl.convert_layout(decay, gl.SliceLayout(0, weights.type.layout))
    weights = weights * weights_decay[None, :] + gl.sum(gl.reshape(weight, [BLOCK // 8, 8, N]), 0)
    async_copy.wait_group(1)
    value_scale = load_scales(values[1], BLOCK)
    if MASKED:
        value_scale = gl.where(written, value_scale, 0.0)
    shifted, unit, unit_decay = lifted(weight, value_scale, unit, BLOCK, N)
    decay = (decay * unit_decay)[None, :]
    front, back = code_halves(values[0], VALUE_BITS, BLOCK)
    output = add_values(output, front, back, weight_operand(shifted, BLOCK, N), decay, VALUE_BITS)
    copy_values(values, source, pages, tile + 1, last, D, VALUE_DIM, KEY_BITS, VALUE_BITS, PAGE_SIZE, BLOCK)
    pages = tile_pages(source[2], tile + 2, last, end, D, VALUE_DIM, KEY_BITS, VALUE_BITS, PAGE_SIZE, BLOCK)
    return (maximum_now, weights, unit, output), pages


@gluon.jit
def whole_tiles(first, last, end, Q_LEN: gl.constexpr, MASK_ALL: gl.constexpr, BLOCK: gl.constexpr):
    """End of the tiles from ``first`` on that need no mask."""
    if MASK_ALL:
        return first
    else:
        return gl.maximum(gl.minimum(last, gl.maximum(end - (Q_LEN - 1), 0) // BLOCK), first)


@gluon.jit(do_not_specialize=["rows", "block_table_stride", "window"])
def attend_warp_kernel(
    query,  # int8 [items, N, D], rotated
    query_stats,  # float32 [items, 2, N]: multiplier and offset of the int8 scores, base-2 logarithm units
    pages,  # uint8 [num_pages, KV_HEADS, CHUNK_BYTES], as int8
    block_table,  # int32 [batch, block_table_stride]
    plan,  # int32, see attend_plan
    partial,  # float32 [items + programs, N, VALUE_DIM]
    stats,  # float32 [items + programs, 2, N]: running maximum and sum
    rows,
    block_table_stride,
    page_stride,
    softcap_log2,
    window,
    D: gl.constexpr,
    VALUE_DIM: gl.constexpr,
    KEY_BITS: gl.constexpr,
    VALUE_BITS: gl.constexpr,
    PAGE_SIZE: gl.constexpr,
    CHUNK_BYTES: gl.constexpr,
    KV_HEADS: gl.constexpr,
    CHUNKS: gl.constexpr,
    GROUP: gl.constexpr,
    Q_LEN: gl.constexpr,
    N: gl.constexpr,
    BLOCK: gl.constexpr,
    HAS_STARTS: gl.constexpr,
    HAS_WINDOW: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
    ROWS_BLOCK: gl.constexpr,
    PDL: gl.constexpr,
):
    if PDL:
        gl.inline_asm_elementwise(WAIT, "=r", [], dtype=gl.int32, is_pure=False, pack=1)
        gl.inline_asm_elementwise(LAUNCH, "=r", [], dtype=gl.int32, is_pure=False, pack=1)
    shared = (allocate_tile(D, KEY_BITS, gl.int8, BLOCK), allocate_tile(VALUE_DIM, VALUE_BITS, gl.int16, BLOCK))
    tables = lookup_tables(KEY_BITS)
    program = gl.program_id(0)
    total = gl.load(plan + rows - 1)
    share = gl.maximum(gl.cdiv(total, gl.num_programs(0)), 1)
    tile = program * share
    stop = gl.minimum(tile + share, total)
    n = gl.arange(0, N, layout=gl.SliceLayout(0, PRODUCT))
    while tile < stop:
        batch, item, first, last, start, end = load_piece(plan, rows, tile, stop, KV_HEADS * CHUNKS, ROWS_BLOCK)
        multiplier = gl.maximum(gl.load(query_stats + item * 2 * N + n), SMALLEST_MULTIPLIER)
        offset = gl.load(query_stats + item * 2 * N + N + n) / multiplier
        magic = gl.full([BLOCK, N], MAGIC_BITS, gl.int32, layout=PRODUCT)
        initial = magic + gl.floor(offset + 0.5).to(gl.int32)[None, :]
        q = query_tiles(query + item.to(gl.int64) * N * D, KEY_BITS, N, D)
        item_query = (q, tables, initial, multiplier, end - Q_LEN + ((item % CHUNKS) * N + n) // GROUP)
        table = block_table + batch.to(gl.int64) * block_table_stride
        chunk_base = pages + (item // CHUNKS) % KV_HEADS * CHUNK_BYTES
        source = (chunk_base, page_stride, table)
        tile_page = tile_pages(table, first, last, end, D, VALUE_DIM, KEY_BITS, VALUE_BITS, PAGE_SIZE, BLOCK)
        copy_keys(shared[0], source, tile_page, first, last, D, VALUE_DIM, KEY_BITS, VALUE_BITS, PAGE_SIZE, BLOCK)
        copy_values(shared[1], source, tile_page, first, last, D, VALUE_DIM, KEY_BITS, VALUE_BITS, PAGE_SIZE, BLOCK)
        tile_page = tile_pages(table, first + 1, last, end, D, VALUE_DIM, KEY_BITS, VALUE_BITS, PAGE_SIZE, BLOCK)
        zero = gl.zeros([BLOCK, N], gl.float32, layout=PRODUCT)
        state = (
            gl.full([N], NEVER, gl.float32, layout=gl.SliceLayout(0, PRODUCT)),
            gl.sum(gl.reshape(zero, [BLOCK // 8, 8, N]), 0),
            SMALLEST_SCALE * 1.0,
            zero_output(VALUE_BITS, N, VALUE_DIM),
        )
        whole = whole_tiles(first, last, end, Q_LEN, HAS_STARTS or HAS_WINDOW, BLOCK)
        for i in range(first, whole):
            state, tile_page = step(
                state, shared, source, item_query, tile_page, i, last, (start, end), softcap_log2, window,
                D, VALUE_DIM, KEY_BITS, VALUE_BITS, N, PAGE_SIZE, BLOCK, Q_LEN,
                HAS_STARTS, HAS_WINDOW, HAS_SOFTCAP, False,
            )  # fmt: skip
        for i in range(whole, last):
            state, tile_page = step(
                state, shared, source, item_query, tile_page, i, last, (start, end), softcap_log2, window,
                D, VALUE_DIM, KEY_BITS, VALUE_BITS, N, PAGE_SIZE, BLOCK, Q_LEN,
                HAS_STARTS, HAS_WINDOW, HAS_SOFTCAP, True,
            )  # fmt: skip
        async_copy.wait_group(0)
        maximum, weights, unit, output = state
        slot = (item + program).to(gl.int64)
        store_output(partial + slot * N * VALUE_DIM, output, unit * 2.0, VALUE_BITS, N, VALUE_DIM)
        base2 = maximum if HAS_SOFTCAP else maximum * multiplier
        gl.store(stats + slot * 2 * N + n, base2)
        weight = gl.convert_layout(gl.sum(weights, 0), gl.SliceLayout(0, PRODUCT))
        gl.store(stats + slot * 2 * N + N + n, weight)
        tile += last - first
