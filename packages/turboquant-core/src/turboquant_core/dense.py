"""Attention over keys and values that are not packed, with the log-sum-exp that merging needs."""

from __future__ import annotations

import torch
from torch import Tensor

from .provider import Attended


def scaling_of(query: Tensor, scaling: float | None) -> float:
    """The multiplier of ``Q K^T``: ``scaling``, or for None ``head_dim ** -0.5`` of ``query`` ``[..., head_dim]``."""
    return float(query.shape[-1] ** -0.5) if scaling is None else scaling


def soft_capped(scores: Tensor, softcap: float | None) -> Tensor:
    """``c * tanh(score / c)`` for the cap ``c``; the scores themselves for None."""
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def attend_dense(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    visible: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Attended:
    """Attention in float32 over any pattern of visible keys.

    Args:
        query: float ``[batch, q_heads, q_len, head_dim]``; ``q_heads`` a multiple of ``kv_heads``.
        keys: float ``[batch, kv_heads, length, head_dim]``.
        values: float ``[batch, kv_heads, length, value_head_dim]``; what no query sees may be NaN.
        visible: bool ``[batch or 1, q_len, length]``.
        scaling: multiplier of ``Q K^T``.
        softcap: ``c`` in ``c * tanh(score / c)``; None for none.
        sinks: float ``[q_heads]``, logits that only enlarge the softmax denominator.

    Returns:
        out float32 ``[batch, q_heads, q_len, value_head_dim]``, 0 for a query that sees no key, and lse float32
        ``[batch, q_heads, q_len]``, ``-inf`` there without a sink.
    """
    kv_heads = keys.shape[1]
    grouped = query.float().unflatten(1, (kv_heads, -1))
    scores = soft_capped(scaling * (grouped @ keys.float().transpose(-1, -2).unsqueeze(2)), softcap)
    hidden = ~visible[:, None, None]
    scores = scores.masked_fill(hidden, -torch.inf)
    lse = torch.logsumexp(scores, dim=-1)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.float().view(1, kv_heads, -1, 1).expand_as(lse))
    weights = torch.exp(scores - lse.unsqueeze(-1)).masked_fill(hidden, 0.0)
    # Unseen tokens may be uninitialised bytes whose scale is NaN; 0 * NaN would reach the output.
    unseen = ~visible.any(1)[:, None, :, None]
    out = weights @ values.float().masked_fill(unseen, 0.0).unsqueeze(2)
    return Attended(out.flatten(1, 2), lse.flatten(1, 2))
