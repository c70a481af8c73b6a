"""Attention of a few query vectors to a block of exact tokens, added to what was seen before."""

from __future__ import annotations

import triton
import triton.language as tl

NEVER = tl.constexpr(-1.0e30)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def weighted_values(weight, value):
    """float32 ``[N, D]``: fp32 ``weight [N, rows]`` times values of any float type, without rounding weights to it."""
    if value.dtype == tl.float32:
        return tl.dot(weight, value, input_precision="ieee")
    else:
        high = weight.to(value.dtype)
        low = (weight - high.to(tl.float32)).to(value.dtype)
        return tl.dot(low, value, tl.dot(high, value))


@triton.jit
def add_block(
    q,  # [N, D]
    offset,  # float32 [N], what scores are too large by
    key,  # [rows, D]
    value,  # [rows, VALUE_DIM]
    visible,  # bool [N, rows]
    maximum,  # float32 [N], in units of log 2
    total,  # float32 [N]
    output,  # float32 [N, VALUE_DIM], not divided by total
    scaling_log2,
    softcap_log2,
    HAS_SOFTCAP: tl.constexpr,
):
    """``maximum``, ``total`` and ``output`` with the block's tokens in them."""
    score = (tl.dot(q, tl.trans(key), input_precision="ieee") - offset[:, None]) * scaling_log2
    if HAS_SOFTCAP:
        # tanh(x) = 1 - 2 / (exp(2 x) + 1), with x = score / softcap in natural units.
        score = softcap_log2 - 2 * softcap_log2 / (tl.exp2(score * (2.0 * LOG2_E / softcap_log2)) + 1)
    score = tl.where(visible, score, NEVER)
    maximum_now = tl.maximum(maximum, tl.max(score, 1))
    decay = tl.exp2(maximum - maximum_now)
    weight = tl.where(visible, tl.exp2(score - maximum_now[:, None]), 0.0)
    total = total * decay + tl.sum(weight, 1)
    return maximum_now, total, output * decay[:, None] + weighted_values(weight, value)


@triton.jit
def take_part(lse, place, at, real, mask):
    """``maximum``, ``total`` and ``output`` of a part that is done; a query that saw nothing has total 0."""
    packed_lse = tl.load(lse + at, mask=real, other=float("-inf"))
    total = tl.where(packed_lse > float("-inf"), 1.0, 0.0)
    output = tl.load(place, mask=mask & (total > 0.0)[:, None], other=0.0).to(tl.float32)
    return tl.maximum(packed_lse * LOG2_E, NEVER), total, output


@triton.jit
def give_part(lse, place, at, real, mask, maximum, total, output):
    """Inverse of :func:`take_part`."""
    some = tl.where(total == 0.0, 1.0, total)
    tl.store(place, (output / some[:, None]).to(place.dtype.element_ty), mask=mask)
    tl.store(lse + at, tl.where(total == 0.0, float("-inf"), (maximum + tl.log2(some)) * LN_2), mask=real)
