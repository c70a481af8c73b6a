"""One query token's attention over a part that is done and a few exact tokens more, in few operations."""

from __future__ import annotations

import torch
from torch import Tensor

from .dense import soft_capped
from .provider import Attended


def add_tokens(
    part: Attended,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Attended:
    """Attention over the keys of ``part`` and ``keys``, of which every query sees all, in float32.

    ``part`` enters the softmax as one more key, whose score is its lse and whose value its output.

    Args:
        part: of the same queries; each sees a key there. ``out`` ``[batch, q_heads, 1, value_head_dim]``.
        query: float ``[batch, q_heads, 1, head_dim]``; ``q_heads`` a multiple of ``kv_heads``.
        keys: float ``[batch, kv_heads, length, head_dim]``.
        values: float ``[batch, kv_heads, length, value_head_dim]``.
        scaling: multiplier of ``Q K^T``.
        softcap: ``c`` in ``c * tanh(score / c)``; None for none.
        sinks: float ``[q_heads]``, logits that only enlarge the softmax denominator; ``part`` has none.

    Returns:
        The shapes and dtypes of ``part``.
    """
    batch, kv_heads, length, head_dim = keys.shape
    rows = batch * kv_heads
    # Products of three axes: with four, each is half a dozen operations, and the host waits for them.
    grouped = query.float().reshape(rows, -1, head_dim)
    of_part = part.lse.reshape(rows, -1, 1)
    by_head = keys.float().reshape(rows, length, head_dim).transpose(1, 2)
    # With beta 0 the first argument gives nothing but a shape.
    scores = torch.baddbmm(of_part, grouped, by_head, beta=0, alpha=scaling)
    columns = [soft_capped(scores, softcap), of_part]
    if sinks is not None:
        columns.append(sinks.float().view(1, kv_heads, -1, 1).expand(batch, -1, -1, -1).flatten(0, 1))
    log_weights = torch.log_softmax(torch.cat(columns, -1), -1)
    weights, of_part, *_ = torch.split_with_sizes(log_weights.exp(), (length, *[1] * (len(columns) - 1)), -1)
    before = part.out.reshape(rows, -1, part.out.shape[3]).float()
    own = torch.bmm(weights, values.float().reshape(rows, length, -1))
    out = torch.addcmul(own, of_part, before)
    lse = part.lse - log_weights[..., length].view(part.lse.shape)
    return Attended(out.view(part.out.shape).to(part.out.dtype), lse)
