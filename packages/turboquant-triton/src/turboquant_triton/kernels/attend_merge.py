"""Put the pieces of each query head together: log-sum-exp merge, attention sink, inverse rotation. One launch."""

from __future__ import annotations

import triton
import triton.language as tl

from .rotate_vector import load_rotation, rotate_rows

NEVER = tl.constexpr(-1.0e30)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def piece_range(plan, rows, row, local, programs, ITEMS_PER_ROW: tl.constexpr):
    """First program with a piece of item ``local`` of ``row``, and how many have one; for each of several."""
    total = tl.load(plan + rows - 1)
    share = tl.maximum(tl.cdiv(total, programs), 1)
    before = tl.load(plan + row - 1, mask=row > 0, other=0)
    tiles = (tl.load(plan + row) - before) // ITEMS_PER_ROW
    first_tile = before + local * tiles
    first = first_tile // share
    return first, tl.where(tiles > 0, (first_tile + tiles - 1) // share - first + 1, 0)


@triton.jit(do_not_specialize=["rows", "programs", "vectors"])
def attend_merge_kernel(
    partial,  # float32 [slots, N, D]
    stats,  # float32 [slots, 2, N]
    plan,
    hadamard,  # fp16 [D, D], transposed
    signs,  # float32 [D]
    sinks,  # float [KV_HEADS * GROUP]
    out,  # [tokens, KV_HEADS * GROUP, D]
    lse,  # float32 [tokens, KV_HEADS * GROUP]
    rows,
    programs,
    vectors,
    output_scale,
    D: tl.constexpr,
    KV_HEADS: tl.constexpr,
    CHUNKS: tl.constexpr,
    GROUP: tl.constexpr,
    Q_LEN: tl.constexpr,
    N: tl.constexpr,
    ROTATED: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    PIECES: tl.constexpr,
    VECTORS: tl.constexpr,
    PDL: tl.constexpr,
):
    # A vector beyond the last is the last once more, with the same result.
    vector = tl.minimum(tl.program_id(0) * VECTORS + tl.arange(0, VECTORS), vectors - 1)
    if ROTATED:
        matrix = load_rotation(hadamard, D)
    if PDL:
        tl.extra.cuda.gdc_wait()
    token = vector // (KV_HEADS * GROUP)
    head = vector % (KV_HEADS * GROUP)
    flat = (token % Q_LEN) * GROUP + head % GROUP
    local = (head // GROUP) * CHUNKS + flat // N
    row = token // Q_LEN
    item = row * KV_HEADS * CHUNKS + local
    n = flat % N
    d = tl.arange(0, triton.next_power_of_2(D))
    first, count = piece_range(plan, rows, row, local, programs, KV_HEADS * CHUNKS)
    maximum = tl.full((VECTORS,), NEVER, tl.float32)
    weight = tl.zeros((VECTORS,), tl.float32)
    if HAS_SINKS:
        maximum = tl.load(sinks + head).to(tl.float32) * LOG2_E
        weight = tl.full((VECTORS,), 1.0, tl.float32)
    output = tl.zeros((VECTORS, triton.next_power_of_2(D)), tl.float32)
    inside = (d < D)[None, :]
    for base in range(0, tl.max(count, 0), PIECES):
        piece = base + tl.arange(0, PIECES)[None, :]
        slot = (item + first)[:, None].to(tl.int64) + piece
        valid = piece < count[:, None]
        piece_maximum = tl.load(stats + slot * 2 * N + n[:, None], mask=valid, other=NEVER)
        piece_weight = tl.load(stats + slot * 2 * N + N + n[:, None], mask=valid, other=0.0)
        maximum_now = tl.maximum(maximum, tl.max(piece_maximum, 1))
        decay = tl.exp2(maximum - maximum_now)
        factor = tl.exp2(piece_maximum - maximum_now[:, None])
        source = partial + ((slot * N + n[:, None]) * D)[:, :, None] + d[None, None, :]
        tile = tl.load(source, mask=valid[:, :, None] & inside[:, None, :], other=0.0)
        output = output * decay[:, None] + tl.sum(tile * factor[:, :, None], 1)
        weight = weight * decay + tl.sum(piece_weight * factor, 1)
        maximum = maximum_now
    output *= (output_scale / tl.where(weight == 0.0, 1.0, weight))[:, None]
    if ROTATED:
        output = rotate_rows(output, matrix, D)
        output *= tl.load(signs + d, mask=d < D, other=0.0)[None, :]
    target = out + vector.to(tl.int64)[:, None] * D + d[None, :]
    tl.store(target, output.to(out.dtype.element_ty), mask=inside)
    visible = tl.where(weight == 0.0, 1.0, weight)
    tl.store(lse + vector, tl.where(weight == 0.0, float("-inf"), (maximum + tl.log2(visible)) * LN_2))
