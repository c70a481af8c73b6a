"""Attention over the exact rows of pages, merged in place with what was found in their codes. One launch."""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from turboquant_core import Attended, CacheCodec
from turboquant_core.exact import exact_views

from ..exact_checks import check_attend_exact
from .attend_plan import ragged_rows
from .exact_block import add_block, give_part, take_part

_WIDEST_N = 32
_BLOCK = 32


@triton.jit
def row_of_program(program, query_start_loc, seq_lens, batch, Q_LEN: tl.constexpr, RAGGED: tl.constexpr):
    """Batch entry and one past the position of the last query of a row."""
    if RAGGED:
        entry, end = ragged_rows(program + tl.arange(0, 1), query_start_loc, seq_lens, batch, 64)
        return tl.sum(entry, 0), tl.sum(end, 0)
    else:
        return program, tl.load(seq_lens + program)


@triton.jit(do_not_specialize=["batch", "block_table_stride"])
def attend_exact_kernel(
    query,  # [tokens, KV_HEADS * GROUP, D]
    key_rows,  # exact keys [num_pages, KV_HEADS, FIRST + RING, D], strided
    value_rows,
    block_table,
    seq_lens,
    query_start_loc,
    center,  # float32 [KV_HEADS, D]
    out,  # [tokens, KV_HEADS * GROUP, VALUE_DIM]
    lse,  # float32 [tokens, KV_HEADS * GROUP]
    batch,
    token_stride,
    head_stride,
    block_table_stride,
    page_stride,
    chunk_stride,
    scaling_log2,
    softcap_log2,
    D: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    FIRST: tl.constexpr,
    RING: tl.constexpr,
    RECENT: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    Q_LEN: tl.constexpr,
    CHUNKS: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    RAGGED: tl.constexpr,
    HAS_CENTER: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    SPAN: tl.constexpr = RECENT + Q_LEN - 1 if RECENT else 0
    chunk = tl.program_id(0) % CHUNKS
    kv_head = (tl.program_id(0) // CHUNKS) % KV_HEADS
    row = tl.program_id(0) // (CHUNKS * KV_HEADS)
    entry, end = row_of_program(row, query_start_loc, seq_lens, batch, Q_LEN, RAGGED)
    flat = chunk * N + tl.arange(0, N)
    real = flat < Q_LEN * GROUP
    token = row * Q_LEN + flat // GROUP
    head = kv_head * GROUP + flat % GROUP
    position = end - Q_LEN + flat // GROUP
    d = tl.arange(0, triton.next_power_of_2(D))
    value_d = tl.arange(0, triton.next_power_of_2(VALUE_DIM))
    vectors = query + token.to(tl.int64) * token_stride + head * head_stride
    q = tl.load(vectors[:, None] + d[None, :], mask=real[:, None] & (d < D)[None, :], other=0.0)
    offset = tl.zeros((N,), tl.float32)
    if HAS_CENTER:
        # Packed scores lack the centre, and both parts must lack it to be merged.
        mean = tl.load(center + kv_head * D + d, mask=d < D, other=0.0)
        offset = tl.sum(q.to(tl.float32) * mean[None, :], 1)
    at = (token * KV_HEADS * GROUP + head).to(tl.int64)
    place = out + at[:, None] * VALUE_DIM + value_d[None, :]
    mask = real[:, None] & (value_d < VALUE_DIM)[None, :]
    maximum, total, output = take_part(lse, place, at, real, mask)
    for base in range(0, FIRST + SPAN, BLOCK):
        index = base + tl.arange(0, BLOCK)
        is_first = index < FIRST
        here = tl.where(is_first, index, end - SPAN + index - FIRST)
        seen = (here < end) & (is_first | ((here >= FIRST) & (index < FIRST + SPAN)))
        page = tl.load(block_table + entry.to(tl.int64) * block_table_stride + here // PAGE_SIZE, mask=seen, other=0)
        start = page.to(tl.int64) * page_stride + kv_head * chunk_stride
        slot = tl.where(is_first, index, FIRST + here % PAGE_SIZE % RING if RING else 0)
        key = tl.load(
            (key_rows + start + slot * D)[:, None] + d[None, :], mask=seen[:, None] & (d < D)[None, :], other=0.0
        )
        visible = seen[None, :] & (here[None, :] <= position[:, None])
        visible = visible & (is_first[None, :] | (here[None, :] > position[:, None] - RECENT))
        value = tl.load(
            (value_rows + start + slot * VALUE_DIM)[:, None] + value_d[None, :],
            mask=seen[:, None] & (value_d < VALUE_DIM)[None, :],
            other=0.0,
        )
        maximum, total, output = add_block(
            q, offset, key, value, visible, maximum, total, output, scaling_log2, softcap_log2, HAS_SOFTCAP
        )
    give_part(lse, place, at, real, mask, maximum, total, output)


def attend_exact(
    query: Tensor,
    pages: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    codec: CacheCodec,
    packed: Attended,
    *,
    recent: int,
    scaling: float,
    query_start_loc: Tensor | None,
    softcap: float | None,
) -> Attended:
    """:meth:`turboquant_core.exact.ExactRowsProvider.attend_exact` in one launch, without waiting for the device.

    Raises:
        ValueError: shapes or dtypes do not fit, or the ring is too small.
    """
    check_attend_exact(query, pages, block_table, seq_lens, codec, packed, recent, query_start_loc, softcap)
    layout, tokens = codec.layout, query.shape[0]
    ragged = query_start_loc is not None
    rows = tokens if ragged else seq_lens.shape[0]
    if tokens == 0 or layout.exact.first + recent == 0:
        return packed
    query = query if query.stride(-1) == 1 else query.contiguous()
    key_rows, value_rows = exact_views(pages, layout, query.dtype)
    q_len, group = tokens // rows, query.shape[1] // layout.kv_heads
    n = min(max(16, 1 << (q_len * group - 1).bit_length()), _WIDEST_N)
    chunks = -(-q_len * group // n)
    attend_exact_kernel[(rows * layout.kv_heads * chunks,)](
        query,
        key_rows,
        value_rows,
        block_table,
        seq_lens,
        query_start_loc if query_start_loc is not None else seq_lens,
        packed.lse if codec.key.center is None else codec.key.center,
        packed.out,
        packed.lse,
        seq_lens.shape[0],
        query.stride(0),
        query.stride(1),
        block_table.stride(0),
        key_rows.stride(0),
        key_rows.stride(1),
        scaling * math.log2(math.e),
        (softcap or 0.0) * math.log2(math.e),
        D=layout.key.head_dim,
        VALUE_DIM=layout.value.head_dim,
        PAGE_SIZE=layout.page_size,
        FIRST=layout.exact.first,
        RING=layout.exact.ring,
        RECENT=recent,
        KV_HEADS=layout.kv_heads,
        GROUP=group,
        Q_LEN=q_len,
        CHUNKS=chunks,
        N=n,
        BLOCK=_BLOCK,
        RAGGED=ragged,
        HAS_CENTER=codec.key.center is not None,
        HAS_SOFTCAP=softcap is not None,
        num_warps=4,
        num_stages=1,
    )
    return packed
