"""What attention needs before it starts: rotated int8 queries, and the plan of tiles. One launch."""

from __future__ import annotations

import triton
import triton.language as tl

from .attend_plan import write_plan
from .rotate_vector import load_rotation, rotate_rows
from .unpack_asm import key_step_ratio
from .widths import is_mixed

LARGEST_INT8 = tl.constexpr(127.0)


@triton.jit(do_not_specialize=["rows", "batch", "vectors", "window"])
def attend_prepare_kernel(
    query,  # float [tokens, KV_HEADS * GROUP, D]
    hadamard,  # fp16 [D, D]
    signs,  # float32 [D]
    quantized,  # int8 (or float32 when not QUANTIZE) [items, N, D]
    stats,  # float32 [items, 2, N]
    seq_lens,
    seq_starts,
    query_start_loc,
    plan,
    rows,
    batch,
    vectors,
    token_stride,
    head_stride,
    multiplier,  # scaling * log2(e), times the step of the (first) key levels when QUANTIZE
    window,
    D: tl.constexpr,
    KV_HEADS: tl.constexpr,
    CHUNKS: tl.constexpr,
    GROUP: tl.constexpr,
    Q_LEN: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    QUANTIZE: tl.constexpr,
    RAGGED: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    SKIP_FIRST: tl.constexpr,
    SKIP_LAST: tl.constexpr,
    ROWS_BLOCK: tl.constexpr,
    KEY_BITS: tl.constexpr,
    VECTORS: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    block = tl.program_id(0)
    if block == tl.num_programs(0) - 1:
        write_plan(
            plan,
            seq_lens,
            seq_starts,
            query_start_loc,
            rows,
            batch,
            window,
            KV_HEADS * CHUNKS,
            Q_LEN,
            BLOCK,
            RAGGED,
            HAS_STARTS,
            HAS_WINDOW,
            SKIP_FIRST,
            SKIP_LAST,
            ROWS_BLOCK,
        )
    else:
        matrix = load_rotation(hadamard, D)
        # A vector beyond the last is the last once more, with the same result.
        vector = tl.minimum(block * VECTORS + tl.arange(0, VECTORS), vectors - 1)
        token = vector // (KV_HEADS * GROUP)
        head = vector % (KV_HEADS * GROUP)
        flat = (token % Q_LEN) * GROUP + head % GROUP
        item = ((token // Q_LEN) * KV_HEADS + head // GROUP) * CHUNKS + flat // N
        n = flat % N
        d = tl.arange(0, triton.next_power_of_2(D))
        inside = (d < D)[None, :]
        source = query + token.to(tl.int64) * token_stride + head * head_stride
        x = tl.load(source[:, None] + d[None, :], mask=inside, other=0.0).to(tl.float32)
        x *= tl.load(signs + d, mask=d < D, other=0.0)[None, :]
        rotated = rotate_rows(x, matrix, D)
        target = quantized + ((item.to(tl.int64) * N + n) * D)[:, None] + d[None, :]
        if QUANTIZE:
            largest = tl.max(tl.abs(rotated), 1)
            scaled = rotated * tl.where(largest > 0, LARGEST_INT8 / largest, 0.0)[:, None]
            code = tl.where(scaled >= 0, scaled + 0.5, scaled - 0.5).to(tl.int32)
            step = largest * (multiplier / LARGEST_INT8)
            tl.store(target, code.to(tl.int8), mask=inside)
            tl.store(stats + item * 2 * N + n, step)
            # A key byte stands for byte + 1/2: the halves add up to half the sum of the query.
            total = tl.sum(code, 1).to(tl.float32)
            if is_mixed(KEY_BITS):
                second = tl.sum(tl.where((d < D // 2)[None, :], 0, code), 1).to(tl.float32)
                total += second * (key_step_ratio(KEY_BITS) - 1.0)
            tl.store(stats + item * 2 * N + N + n, step * 0.5 * total)
        else:
            tl.store(target, rotated * multiplier, mask=inside)
