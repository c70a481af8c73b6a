"""``scaled_dot_product_attention`` on packed handles: an untouched model attends to packed pages."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from turboquant_core.dense import scaling_of

from .fused import LARGEST_FUSED_QUERY, LONG_QUERY, fused_attention, unfit_query
from .handle import PackedTensor, StepPast
from .reasons import changed
from .traced import TracedTensor, packed_pair
from .visibility import Visibility, pattern
from .visibility_on_device import visibility_of


def readable(step: StepPast, query: Tensor, mask: Tensor | None, dropout: float, is_causal: bool) -> Visibility | str:
    """Which keys the queries see, or the reason why packed attention cannot tell or take them."""
    if dropout > 0:
        return "attention dropout"
    if is_causal:
        # torch aligns this flag to the first key, a packed past to the last.
        return "is_causal with a past"
    if query.shape[1] % step.past.codec.layout.kv_heads:
        return f"{query.shape[1]} query heads over {step.past.codec.layout.kv_heads} KV heads"
    if query.shape[2] > LARGEST_FUSED_QUERY and mask is not None:
        return LONG_QUERY
    unfit = unfit_query(step, query)
    if unfit is not None:
        return unfit
    return visibility_of(step, query, mask, causal=False)


def _dense(x: Any) -> Any:
    if not isinstance(x, PackedTensor | TracedTensor):
        return x
    x.step.count_decoded(changed())
    return x.dense()


def intercepted_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Replacement of :func:`torch.nn.functional.scaled_dot_product_attention` when keys or values are packed."""
    step = packed_pair(key, value)
    if step is not None:
        visibility = readable(step, query, attn_mask, dropout_p, is_causal)
        if isinstance(visibility, Visibility):
            step.counters.count("intercepted")
            scaling = scaling_of(query, scale)
            return fused_attention(step, query, visibility, scaling=scaling)
        step.count_decoded(visibility)
        if attn_mask is None and not is_causal and step.has_room:
            first = torch.zeros(1, dtype=torch.int64, device=query.device)
            attn_mask = pattern(first, 1, step.length, False, None, step.past.end).unsqueeze(1)
    key, value = (_dense(x) for x in (key, value))
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attn_mask,
        dropout_p=dropout_p,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
    )
