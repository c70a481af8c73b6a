"""The attention and mask functions that Transformers finds by name."""

from __future__ import annotations

import sys
from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from turboquant_core.dense import scaling_of

from .compat import ATTENTION_FUNCTIONS, MASK_FUNCTIONS, eager_mask, sdpa_attention_forward, sdpa_mask
from .fused import LARGEST_FUSED_QUERY, LONG_QUERY, fused_attention, unfit_query
from .handle import StepPast
from .traced import packed_pair
from .visibility import Visibility, pattern
from .visibility_on_device import visibility_of

NAME = "turboquant"
"""Attention implementation over ``sdpa``: prefill and unpacked layers run ``sdpa``."""
EAGER_NAME = "turboquant_eager"
"""The same over a model's own ``eager`` attention."""

# Arguments that do not change the result of attention; those that are read below; any other that is set is unknown.
_HARMLESS = {
    "cache_position",
    "labels",
    "logits_to_keep",
    "num_items_in_batch",
    "output_hidden_states",
    "output_router_logits",
    "position_ids",
    "return_dict",
    "use_cache",
}
_UNDERSTOOD = {"dropout", "is_causal", "s_aux", "sliding_window", "softcap"}
_OFFSET_MATTERS = ("s_aux", "softcap")
_KNOWN = _HARMLESS | _UNDERSTOOD

# sdpa drops these, or refuses them at the prompt: doing otherwise over a packed past would be another model.
_UNKNOWN_TO_SDPA = {"s_aux", "softcap"} - signature(sdpa_attention_forward).parameters.keys()

Attention = Callable[..., tuple[Tensor, Tensor | None]]


def _unknown_argument(kwargs: dict[str, Any]) -> str | None:
    """The first argument that might change the result in a way that packed attention does not know."""
    for name, value in kwargs.items():
        if value is not None and value is not False and name not in _KNOWN:
            return name
    return None


def _is_causal(module: torch.nn.Module, kwargs: dict[str, Any]) -> bool:
    given = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if given is None else given)


def _visibility(
    module: torch.nn.Module, step: StepPast, query: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
) -> Visibility | str:
    unknown = _unknown_argument(kwargs)
    if unknown is not None:
        return f"argument {unknown} of its attention, which packed attention does not have"
    if module.training and kwargs.get("dropout"):
        return "attention dropout"
    window = kwargs.get("sliding_window")
    if window not in (None, step.window) and window < step.length:
        return "sliding window shorter than the packed past"
    if query.shape[2] > LARGEST_FUSED_QUERY:
        return LONG_QUERY
    unfit = unfit_query(step, query, needs_offset=any(kwargs.get(name) is not None for name in _OFFSET_MATTERS))
    if unfit is not None:
        return unfit
    return visibility_of(step, query, mask, _is_causal(module, kwargs))


def _causal_mask(base: Attention, query: Tensor, step: StepPast) -> Tensor:
    """Mask ``[1, 1, q_len, length]``, aligned to the last key: what a missing mask means over a past."""
    first = torch.zeros(1, dtype=torch.int64, device=query.device)
    hidden = step.past.length - step.length
    visible = pattern(first, query.shape[2], step.length, True, step.window, step.past.end - hidden).unsqueeze(1)
    if base is sdpa_attention_forward:
        return visible
    return torch.zeros_like(visible, dtype=query.dtype).masked_fill(~visible, torch.finfo(query.dtype).min)


def _decoded_attention(
    base: Attention,
    module: torch.nn.Module,
    query: Tensor,
    step: StepPast,
    handles: tuple[Any, Any],
    mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    is_partial = 1 < query.shape[2] < step.length and _is_causal(module, kwargs)
    if mask is None and (is_partial or step.has_room):
        mask = _causal_mask(base, query, step)
    return base(module, query, *(handle.dense() for handle in handles), mask, **kwargs)


def _eager_of(module: torch.nn.Module) -> Attention:
    """The eager attention of the file that defines ``module``: models differ there."""
    return sys.modules[type(module).__module__].eager_attention_forward  # type: ignore[no-any-return]


def _attend(
    base: Attention,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    step = packed_pair(key, value)
    if step is None:
        # A prompt, another kind of layer or of cache: exactly what the model did before.
        return base(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    visibility = _visibility(module, step, query, attention_mask, kwargs)
    if isinstance(visibility, str):
        step.count_decoded(visibility)
        return _decoded_attention(base, module, query, step, (key, value), attention_mask, scaling=scaling, **kwargs)
    step.counters.count("fused")
    out = fused_attention(
        step,
        query,
        visibility,
        scaling=scaling_of(query, scaling),
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("s_aux"),
    )
    return out.transpose(1, 2).contiguous(), None


def turboquant_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Attention of a model patched over ``sdpa``.

    Args:
        module: the attention layer.
        query: ``[batch, q_heads, q_len, head_dim]``.
        key: ``[batch, kv_heads, length, head_dim]``, packed or not.
        value: ``[batch, kv_heads, length, value_head_dim]``, packed or not.
        attention_mask: what the mask function of the same name made.
        kwargs: ``scaling``, ``dropout``, and what a model adds; an unknown argument decodes and runs ``sdpa``. A
            soft cap and sinks, which ``sdpa`` ignores, are ignored.

    Returns:
        ``[batch, q_len, q_heads, value_head_dim]`` and None.
    """
    known = {name: value for name, value in kwargs.items() if name not in _UNKNOWN_TO_SDPA}
    return _attend(sdpa_attention_forward, module, query, key, value, attention_mask, **known)


def turboquant_eager_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """:func:`turboquant_attention` for a model that runs its own ``eager`` attention."""
    return _attend(_eager_of(module), module, query, key, value, attention_mask, **kwargs)


def register() -> None:
    """Register both names with Transformers, each with the mask function of its base. Idempotent."""
    ATTENTION_FUNCTIONS.register(NAME, turboquant_attention)
    ATTENTION_FUNCTIONS.register(EAGER_NAME, turboquant_eager_attention)
    # Without a mask function of the same name, Transformers drops every mask.
    MASK_FUNCTIONS.register(NAME, sdpa_mask)
    MASK_FUNCTIONS.register(EAGER_NAME, eager_mask)
