"""Put the pieces of each query head together: log-sum-exp merge, attention sink, inverse rotation. One launch."""

from __future__ import annotations

import triton
import triton.language as tl

from .rotate_vector import load_rotation, rotate_vector

NEVER = tl.constexpr(-1.0e30)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def piece_range(plan, rows, row, local, programs, ITEMS_PER_ROW: tl.constexpr):
    """First program with a piece of item ``local`` of ``row``, and how many have one."""
    total = tl.load(plan + rows - 1)
    share = tl.maximum(tl.cdiv(total, programs), 1)
    before = tl.load(plan + row - 1, mask=row > 0, other=0)
    tiles = (tl.load(plan + row) - before) // ITEMS_PER_ROW
    first_tile = before + local * tiles
    first = first_tile // share
    return first, tl.where(tiles > 0, (first_tile + tiles - 1) // share - first + 1, 0)


@triton.jit(do_not_specialize=["rows", "programs"])
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
    PDL: tl.constexpr,
):
    vector = tl.program_id(0)
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
    maximum = NEVER
    weight = 0.0
    if HAS_SINKS:
        maximum = tl.load(sinks + head).to(tl.float32) * LOG2_E
        weight = 1.0
    output = tl.zeros((triton.next_power_of_2(D),), tl.float32)
    for base in range(0, count, PIECES):
        piece = base + tl.arange(0, PIECES)
        slot = (item + first + piece).to(tl.int64)
        valid = piece < count
        piece_maximum = tl.load(stats + slot * 2 * N + n, mask=valid, other=NEVER)
        piece_weight = tl.load(stats + slot * 2 * N + N + n, mask=valid, other=0.0)
        maximum_now = tl.maximum(maximum, tl.max(piece_maximum, 0))
        decay = tl.exp2(maximum - maximum_now)
        factor = tl.exp2(piece_maximum - maximum_now)
        tile = tl.load(
            partial + (slot * N + n)[:, None] * D + d[None, :], mask=valid[:, None] & (d < D)[None, :], other=0.0
        )
        output = output * decay + tl.sum(tile * factor[:, None], 0)
        weight = weight * decay + tl.sum(piece_weight * factor, 0)
        maximum = maximum_now
    output *= output_scale / tl.where(weight == 0.0, 1.0, weight)
    if ROTATED:
        output = rotate_vector(output, matrix, D)
        output *= tl.load(signs + d, mask=d < D, other=0.0)
    target = out + vector.to(tl.int64) * D + d
    tl.store(target, output.to(out.dtype.element_ty), mask=d < D)
    visible = tl.where(weight == 0.0, 1.0, weight)
    tl.store(lse + vector, tl.where(weight == 0.0, float("-inf"), (maximum + tl.log2(visible)) * LN_2))
