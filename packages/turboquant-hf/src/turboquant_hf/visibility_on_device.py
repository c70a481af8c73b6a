"""What a mask says, found on the device: where a graph is traced or recorded, the host cannot look at it."""

from __future__ import annotations

import torch
from torch import Tensor

from turboquant_core.device_checks import require

from .handle import StepPast
from .visibility import Visibility, as_bool, is_bias, pattern, read_mask

_LIBRARY = torch.library.Library("turboquant_hf", "DEF")
_LIBRARY.define(
    "visible_starts(Tensor mask, Tensor end, int batch, int? window) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)


def _visible_starts(mask: Tensor, end: Tensor, batch: int, window: int | None) -> Tensor:
    """First visible key int32 ``[batch]`` of each sequence.

    Args:
        mask: ``[batch or 1, 1, queries, length]``, bool or additive.
        end: int64 scalar, keys that there are.
        batch: sequences.
        window: keys that a query sees; None for all.

    Raises:
        ValueError: the mask is anything but causal with left padding; see
            :func:`turboquant_core.device_checks.require`.
    """
    queries, length = mask.shape[2:]
    visible = as_bool(mask)[:, 0].expand(batch, queries, length)
    starts = visible[:, -1 if window is None else 0].int().argmax(-1).int()
    is_causal = (visible == pattern(starts, queries, length, True, window, end)).all()
    require(
        is_causal if mask.dtype == torch.bool else is_causal & ~is_bias(mask),
        "a compiled step over a packed cache needs a mask that is causal with left padding; this one is not, or the "
        "cache holds other tokens than it shows: run the model uncompiled, where such a mask is decoded",
    )
    return starts


def _visible_starts_fake(mask: Tensor, end: Tensor, batch: int, window: int | None) -> Tensor:
    return mask.new_empty(batch, dtype=torch.int32)


# An operator, because a compiler drops assertions that nothing depends on.
_LIBRARY.impl("visible_starts", _visible_starts, "CompositeExplicitAutograd")
torch.library.register_fake("turboquant_hf::visible_starts", _visible_starts_fake, lib=_LIBRARY)


def must_not_wait(device: torch.device) -> bool:
    """Whether a graph is being traced or recorded."""
    return torch.compiler.is_compiling() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing())


def visibility_of(step: StepPast, query: Tensor, mask: Tensor | None, causal: bool) -> Visibility | str:
    """Visibility of a call, or the reason why packed attention cannot express it.

    Args:
        step: the past.
        query: ``[batch, q_heads, q_len, head_dim]``.
        mask: see :func:`turboquant_hf.visibility.read_mask`.
        causal: what a missing mask means for several queries.
    """
    batch, q_len, end = query.shape[0], query.shape[2], step.past.end
    if isinstance(end, int):
        return read_mask(mask, batch, q_len, step.length, causal, step.window)
    if must_not_wait(query.device):
        return visibility_on_device(mask, end, batch, q_len, step.length, causal, step.window)
    return read_mask(mask, batch, q_len, step.length, causal, step.window, int(end))


def visibility_on_device(
    mask: Tensor | None, end: Tensor, batch: int, q_len: int, length: int, causal: bool, window: int | None
) -> Visibility | str:
    """As :func:`turboquant_hf.visibility.read_mask`, without a word from the device.

    Masks that it cannot express are an error when the step runs, unless their shape shows it.
    """
    if mask is None:
        return Visibility(causal=causal or q_len == 1, window=window)
    if mask.dim() != 4 or mask.shape[3] != length:
        return f"mask that is not [batch, heads, q_len, {length}]"
    if mask.shape[1] != 1:
        return "mask that differs between heads"
    starts = torch.ops.turboquant_hf.visible_starts(mask, end, batch, window)
    # One row for several queries: all of them see what the last one does.
    return Visibility(causal=mask.shape[2] == q_len, seq_starts=starts, window=window)
