"""What an attention mask says, in the terms of a packed attention: first visible position of each sequence.

Packed attention is causal, aligned to the last key, with left padding. A mask that says anything else is not
representable, and the caller decodes instead.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


@dataclass(frozen=True, slots=True)
class Visibility:
    """Pattern of a call.

    Attributes:
        causal: query ``i`` of ``q_len`` sees keys up to ``length - q_len + i``; otherwise all keys.
        seq_starts: int32 ``[batch]``, first visible key; None for 0.
        window: keys that a query sees, itself included; None for all.
        latest_start: the largest of ``seq_starts``; None where the host does not know it.
    """

    causal: bool
    seq_starts: Tensor | None = None
    window: int | None = None
    latest_start: int | None = None


def as_bool(mask: Tensor) -> Tensor:
    """True where a key is visible; additive masks hide with values near the dtype's minimum."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def is_bias(mask: Tensor) -> Tensor:
    """Bool scalar: whether an additive mask does anything else than to hide."""
    return ((mask != 0) & (mask > torch.finfo(mask.dtype).min / 2)).any()


def _padding_of(mask: Tensor) -> Tensor | None:
    """Starts of a 2D mask ``[batch, length]``, or None when it hides anything but a prefix."""
    visible = mask.bool()
    starts = visible.int().argmax(-1)
    expected = torch.arange(visible.shape[1], device=mask.device) >= starts.unsqueeze(1)
    return starts.int() if torch.equal(visible, expected) else None


def pattern(
    starts: Tensor, q_len: int, length: int, causal: bool, window: int | None, end: int | Tensor | None = None
) -> Tensor:
    """Bool ``[batch, q_len, length]`` that the arguments stand for; ``end`` is 1 + the last query's position."""
    last = (length if end is None else end) - 1
    key = torch.arange(length, device=starts.device)
    query = (last - torch.arange(q_len - 1, -1, -1, device=starts.device) * causal).view(-1, 1)
    visible = (key >= starts.view(-1, 1, 1)) & (key <= query)
    return visible if window is None else visible & (key > query - window)


_read_masks: MutableMapping[Tensor, dict[tuple[int, ...], Visibility | str]] = WeakTensorKeyDictionary()
"""What masks were found to say: the layers of a forward share one, and reading it waits for the device."""


def read_mask(
    mask: Tensor | None,
    batch: int,
    q_len: int,
    length: int,
    causal: bool,
    window: int | None = None,
    end: int | None = None,
) -> Visibility | str:
    """Visibility of a call, or the reason why packed attention cannot express it.

    Args:
        mask: None, 2D padding ``[batch, length]``, or 4D ``[batch or 1, heads or 1, q_len, length]``, bool or additive.
        batch: sequences.
        q_len: queries of each.
        length: keys of each.
        causal: what a missing mask means for several queries.
        window: of the layer; a mask shows it once the keys are more than a query sees.
        end: keys that there are, where room follows them, which no query may see; None for all.
    """
    if mask is None:
        shown = window if causal and (q_len > 1 or end is not None) else None
        return Visibility(causal=causal or q_len == 1, window=shown)
    if mask.is_inference():
        # Its changes cannot be seen, so what was read once may be out of date.
        return _read(mask, batch, q_len, length, window, end)
    call = (mask._version, batch, q_len, length, window or 0, end or 0)
    known = _read_masks.setdefault(mask, {})
    if call not in known:
        known[call] = _read(mask, batch, q_len, length, window, end)
    return known[call]


def _read(mask: Tensor, batch: int, q_len: int, length: int, window: int | None, end: int | None) -> Visibility | str:
    if tuple(mask.shape) == (batch, length):
        starts = _padding_of(mask)
        return "padding inside a sequence" if starts is None else _from(starts, True, None)
    if mask.dim() != 4 or mask.shape[3] != length:
        return "mask that is neither [batch, length] nor [batch, heads, q_len, length]"
    if mask.shape[1] != 1:
        return "mask that differs between heads"
    if mask.dtype != torch.bool and bool(is_bias(mask)):
        return "additive bias"
    visible = as_bool(mask)[:, 0].expand(batch, q_len, length)
    # The last query sees everything but the padding; under a window, the first one sees furthest back.
    last, first = (visible[:, row].int().argmax(-1).int() for row in (-1, 0))
    candidates: list[tuple[Tensor, bool, int | None]] = [(last, True, None), (last, False, None)]
    if window is not None:
        candidates.append((first, True, window))
    for starts, is_causal, shown in candidates:
        if torch.equal(visible, pattern(starts, q_len, length, is_causal, shown, end)):
            return _from(starts, is_causal, shown)
    return "mask that is neither causal nor padding"


def _from(starts: Tensor, causal: bool, window: int | None) -> Visibility:
    latest = int(starts.max())
    return Visibility(causal, starts if latest else None, window, latest)
