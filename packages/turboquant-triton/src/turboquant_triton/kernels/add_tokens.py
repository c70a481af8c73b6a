"""Attention of one query token of each sequence to a few exact tokens, merged in place with a part that is done."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from turboquant_core import Attended, Gathered

from ..exact_checks import check_add_tokens
from .exact_block import LOG2_E, add_block, give_part, take_part

_LEAST_N = 16
_WIDEST_N = 32
_BLOCK = 16


@triton.jit
def add_run(
    q, offset, keys, values, visible, tokens, key_token_stride, value_token_stride,
    maximum, total, output, scaling_log2, softcap_log2,
    D: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_VISIBLE: tl.constexpr,
):  # fmt: skip
    """:func:`add_block` of those of ``tokens`` that are ``visible``, of one sequence and KV head."""
    d = tl.arange(0, triton.next_power_of_2(D))
    value_d = tl.arange(0, triton.next_power_of_2(VALUE_DIM))
    for base in range(0, tokens, BLOCK):
        index = base + tl.arange(0, BLOCK)
        seen = index < tokens
        if HAS_VISIBLE:
            seen = seen & (tl.load(visible + index, mask=seen, other=0) != 0)
        key = tl.load(
            (keys + index * key_token_stride)[:, None] + d[None, :], mask=seen[:, None] & (d < D)[None, :], other=0.0
        )
        value = tl.load(
            (values + index * value_token_stride)[:, None] + value_d[None, :],
            mask=seen[:, None] & (value_d < VALUE_DIM)[None, :],
            other=0.0,
        )
        shown = tl.broadcast_to(seen[None, :], (q.shape[0], BLOCK))
        maximum, total, output = add_block(
            q, offset, key.to(q.dtype), value, shown, maximum, total, output, scaling_log2, softcap_log2, HAS_SOFTCAP
        )
    return maximum, total, output


@triton.jit(do_not_specialize=["first_tokens", "last_tokens"])
def add_tokens_kernel(
    query,  # [batch, KV_HEADS * GROUP, D], strided
    first_keys,  # [batch, KV_HEADS, first_tokens, D], strided, like the following
    first_values,
    last_keys,
    last_values,
    center,  # float32 [KV_HEADS, D]
    sinks,  # [KV_HEADS * GROUP]
    visible,  # uint8 [batch, first_tokens + last_tokens]
    out,  # [batch, KV_HEADS * GROUP, VALUE_DIM]
    lse,  # float32 [batch, KV_HEADS * GROUP]
    first_tokens,
    last_tokens,
    batch_stride,
    head_stride,
    first_key_batch_stride,
    first_key_head_stride,
    first_key_token_stride,
    first_value_batch_stride,
    first_value_head_stride,
    first_value_token_stride,
    last_key_batch_stride,
    last_key_head_stride,
    last_key_token_stride,
    last_value_batch_stride,
    last_value_head_stride,
    last_value_token_stride,
    scaling_log2,
    softcap_log2,
    D: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNKS: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,  # products in float32, for queries and keys of two dtypes
    HAS_CENTER: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_VISIBLE: tl.constexpr,
):
    kv_head = (tl.program_id(0) // CHUNKS) % KV_HEADS
    row = (tl.program_id(0) // (CHUNKS * KV_HEADS)).to(tl.int64)
    flat = tl.program_id(0) % CHUNKS * N + tl.arange(0, N)
    real = flat < GROUP
    head = kv_head * GROUP + flat
    d = tl.arange(0, triton.next_power_of_2(D))
    value_d = tl.arange(0, triton.next_power_of_2(VALUE_DIM))
    vectors = query + row * batch_stride + head * head_stride
    q = tl.load(vectors[:, None] + d[None, :], mask=real[:, None] & (d < D)[None, :], other=0.0)
    if WIDE:
        q = q.to(tl.float32)
    offset = tl.zeros((N,), tl.float32)
    if HAS_CENTER:
        mean = tl.load(center + kv_head * D + d, mask=d < D, other=0.0)
        offset = tl.sum(q.to(tl.float32) * mean[None, :], 1)
    at = row * KV_HEADS * GROUP + head
    place = out + at[:, None] * VALUE_DIM + value_d[None, :]
    mask = real[:, None] & (value_d < VALUE_DIM)[None, :]
    maximum, total, output = take_part(lse, place, at, real, mask)
    if HAS_SINKS:
        sink = tl.load(sinks + head, mask=real, other=0.0).to(tl.float32) * LOG2_E
        maximum_now = tl.maximum(maximum, sink)
        decay = tl.exp2(maximum - maximum_now)
        total = total * decay + tl.exp2(sink - maximum_now)
        output = output * decay[:, None]
        maximum = maximum_now
    shown = visible + row * (first_tokens + last_tokens)
    maximum, total, output = add_run(
        q, offset, first_keys + row * first_key_batch_stride + kv_head * first_key_head_stride,
        first_values + row * first_value_batch_stride + kv_head * first_value_head_stride,
        shown, first_tokens, first_key_token_stride, first_value_token_stride,
        maximum, total, output, scaling_log2, softcap_log2, D, VALUE_DIM, BLOCK, HAS_SOFTCAP, HAS_VISIBLE,
    )  # fmt: skip
    maximum, total, output = add_run(
        q, offset, last_keys + row * last_key_batch_stride + kv_head * last_key_head_stride,
        last_values + row * last_value_batch_stride + kv_head * last_value_head_stride,
        shown + first_tokens, last_tokens, last_key_token_stride, last_value_token_stride,
        maximum, total, output, scaling_log2, softcap_log2, D, VALUE_DIM, BLOCK, HAS_SOFTCAP, HAS_VISIBLE,
    )  # fmt: skip
    give_part(lse, place, at, real, mask, maximum, total, output)


def add_tokens(
    part: Attended,
    query: Tensor,
    exact: Sequence[Gathered],
    *,
    center: Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
    visible: Tensor | None,
) -> Attended:
    """:meth:`turboquant_core.token_step.TokenStepProvider.add_tokens` in one launch.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    check_add_tokens(part, query, exact, center, softcap, sinks, visible)
    exact = [Gathered(*(x if x.stride(-1) == 1 else x.contiguous() for x in run)) for run in exact]
    (first, last), first_tokens = (exact, exact[0].keys.shape[2]) if len(exact) == 2 else (2 * exact, 0)
    batch, kv_heads, tokens, head_dim = last.keys.shape
    if query.stride(-1) != 1:
        query = query.contiguous()
    group = query.shape[1] // kv_heads
    n = min(max(_LEAST_N, 1 << (group - 1).bit_length()), _WIDEST_N)
    chunks = -(-group // n)
    add_tokens_kernel[(batch * kv_heads * chunks,)](
        query,
        *first,
        *last,
        part.lse if center is None else center,
        part.lse if sinks is None else sinks,
        part.lse if visible is None else visible.contiguous().view(torch.uint8),
        part.out,
        part.lse,
        first_tokens,
        tokens,
        query.stride(0),
        query.stride(1),
        *(stride for x in (*first, *last) for stride in x.stride()[:3]),
        scaling * math.log2(math.e),
        (softcap or 0.0) * math.log2(math.e),
        D=head_dim,
        VALUE_DIM=part.out.shape[3],
        KV_HEADS=kv_heads,
        GROUP=group,
        CHUNKS=chunks,
        N=n,
        BLOCK=_BLOCK,
        WIDE=query.dtype != last.keys.dtype,
        HAS_CENTER=center is not None,
        HAS_SOFTCAP=softcap is not None,
        HAS_SINKS=sinks is not None,
        HAS_VISIBLE=visible is not None,
        num_warps=4,
        num_stages=1,
    )
    return part
