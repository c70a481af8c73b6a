"""Attention over a packed past, whoever asked for it."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from turboquant_core import Attended
from turboquant_core.split_past import SplitPast

from .compat import uncompiled
from .handle import StepPast
from .visibility import Visibility
from .visibility_on_device import must_not_wait

LARGEST_FUSED_QUERY = 16
"""Longer chunks read every key for many queries at once: decoding once is cheaper than packed attention."""

LONG_QUERY = "a long chunk of queries over a past"


def unfit_query(step: StepPast, query: Tensor, *, needs_offset: bool = False) -> str | None:
    """Why packed attention cannot take ``query``, whatever the mask; None when it can.

    Args:
        step: the past.
        query: ``[batch, q_heads, q_len, head_dim]``.
        needs_offset: a constant added to all scores of a query changes the result (soft cap, attention sinks).
    """
    if needs_offset and step.past.codec.key.center is not None:
        return "centred keys under a soft cap or attention sinks"
    if step.past.codec.value is None and query.dtype != step.stored:
        # Raw values are read as the query's dtype.
        return f"{query.dtype} queries over raw {step.stored} values"
    return None


def _attend(past: SplitPast, query: Tensor, **options: Any) -> Attended:
    return past.attend(query, **options)


# Its lengths are numbers of the host: every step would be a graph of its own.
_attend_uncompiled = uncompiled("attention over pages that grow is no part of a graph")(_attend)


def fused_attention(
    step: StepPast,
    query: Tensor,
    visibility: Visibility,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of ``query`` ``[batch, q_heads, q_len, head_dim]``; result in the same form.

    Queries that see all keys (no causal order) become heads of a single query token.
    """
    _check_sinks(step, visibility)
    if step.tiles > 1:
        query, sinks = _by_head(query, step, 1), None if sinks is None else _by_head(sinks, step, 0)
    batch, q_heads, q_len, head_dim = query.shape
    folded = not visibility.causal and q_len > 1
    if folded:
        query = query.reshape(batch, q_heads * q_len, 1, head_dim)
    must_break = torch.compiler.is_compiling() and not step.has_room
    out = (_attend_uncompiled if must_break else _attend)(
        step.past,
        query,
        scaling=scaling,
        seq_starts=_starts(step, visibility),
        latest_start=None if step.hidden else visibility.latest_start,
        window=visibility.window,
        softcap=softcap,
        sinks=sinks,
    ).out
    out = out.reshape(batch, q_heads, q_len, -1) if folded else out
    return out if step.tiles == 1 else _by_tile(out, step)


def _by_head(x: Tensor, step: StepPast, axis: int) -> Tensor:
    """Query heads of the same KV head one after the other, where they come round by round."""
    rounds = (step.tiles, step.past.codec.layout.kv_heads, -1)
    by_head: Tensor = x.unflatten(axis, rounds)
    return by_head.transpose(axis, axis + 1).flatten(axis, axis + 2)


def _by_tile(out: Tensor, step: StepPast) -> Tensor:
    """Inverse of :func:`_by_head` for ``[batch, q_heads, q_len, value_head_dim]``."""
    by_tile: Tensor = out.unflatten(1, (step.past.codec.layout.kv_heads, step.tiles, -1))
    return by_tile.transpose(1, 2).flatten(1, 3)


def _starts(step: StepPast, visibility: Visibility) -> Tensor | None:
    """First visible position in the past, of which the handles may show the end only."""
    if not step.hidden:
        return visibility.seq_starts
    shown = visibility.seq_starts
    if shown is None:
        shown = torch.zeros(step.past.batch, dtype=torch.int32, device=step.past.device)
    return shown + step.hidden


def _check_sinks(step: StepPast, visibility: Visibility) -> None:
    if not step.past.sinks.count or visibility.seq_starts is None or step.padding_is_known:
        return
    if must_not_wait(step.past.device):
        raise ValueError(
            "sink_tokens in a compiled step: the cache must know where sequences begin, call "
            "note_padding(attention_mask) on it once, before the prompt"
        )
    warnings.warn(
        "sink_tokens kept padding in full precision, because the cache was not told of the left padding: use "
        "patch_model(), or call note_padding(attention_mask) on the cache before each forward",
        stacklevel=2,
    )
