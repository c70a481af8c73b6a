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
    batch, kv_heads, length, _ = keys.shape
    grouped = (batch, kv_heads, -1)
    scores = (query.float() * scaling).reshape(*grouped, query.shape[3]) @ keys.float().transpose(-1, -2)
    columns = [soft_capped(scores, softcap), part.lse.reshape(*grouped, 1)]
    if sinks is not None:
        columns.append(sinks.float().view(1, kv_heads, -1, 1).expand(batch, -1, -1, -1))
    log_weights = torch.log_softmax(torch.cat(columns, -1), -1)
    weights = log_weights.exp()
    before = part.out.reshape(*grouped, part.out.shape[3]).float()
    out = torch.addcmul(weights[..., :length] @ values.float(), weights[..., length : length + 1], before)
    lse = part.lse - log_weights[..., length].reshape(part.lse.shape)
    return Attended(out.reshape(part.out.shape).to(part.out.dtype), lse)
