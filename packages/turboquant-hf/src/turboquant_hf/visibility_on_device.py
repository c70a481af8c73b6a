"""What a mask says, found on the device: where a graph is traced or recorded, the host cannot look at it."""

from __future__ import annotations

import torch
from torch import Tensor

from turboquant_core.device_checks import require_before

from .handle import StepPast
from .visibility import Visibility, as_bool, is_bias, read_mask


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
    # One row for several queries: all of them see what the last one does.
    return Visibility(
        causal=mask.shape[2] == q_len, seq_starts=_visible_starts(mask, end, batch, window), window=window
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
    queries = mask.shape[2]
    first, last, count = _visible_range(as_bool(mask)[:, 0])
    # The last query sees everything but the padding; under a window, the first one sees furthest back.
    row = -1 if window is None else 0
    starts = first[:, row]
    latest = end - queries + torch.arange(queries, device=mask.device)
    earliest = starts.unsqueeze(1)
    if window is not None:
        earliest = torch.maximum(earliest, latest - window + 1)
    expected = (latest - earliest + 1).clamp(min=0)
    is_range = (count == expected) & ((count == 0) | ((first == earliest) & (last == latest)))
    is_causal = (is_range & (count[:, row] > 0).unsqueeze(1)).all()
    shown = starts.int().expand(batch).contiguous()
    require_before(
        shown,
        is_causal if mask.dtype == torch.bool else is_causal & ~is_bias(mask),
        "a compiled step over a packed cache needs a mask that is causal with left padding; this one is not, or the "
        "cache holds other tokens than it shows: run the model uncompiled, where such a mask is decoded",
    )
    return shown


def _visible_range(visible: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """First and last visible key, and how many there are, int64 ``[batch, queries]`` of ``[batch, queries, length]``.

    They say whether the keys are a range, and do not depend on a layer: a compiler finds all three in one pass.
    """
    length = visible.shape[-1]
    key = torch.arange(length, device=visible.device)
    first = torch.where(visible, key, length).amin(-1)
    last = torch.where(visible, key, -1).amax(-1)
    return first, last, visible.sum(-1)
