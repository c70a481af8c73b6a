"""First visible token of each sequence: sinks are counted from there, and layers see no mask."""

from __future__ import annotations

import torch
from torch import Tensor


class Padding:
    """Left padding of the sequences of a cache, as far as it was told.

    Args:
        is_wanted: whether a patched model should tell it before every forward.
    """

    def __init__(self, is_wanted: bool) -> None:
        self.is_wanted = is_wanted
        self._starts: Tensor | None = None

    @property
    def is_known(self) -> bool:
        """Whether a mask was seen."""
        return self._starts is not None

    def note(self, attention_mask: Tensor) -> None:
        """Read ``[batch, tokens]``, nonzero where visible; all tokens so far and those of the coming forward.

        Raises:
            ValueError: the mask has another number of dimensions.
        """
        if attention_mask.dim() != 2:
            raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}; it must be [batch, tokens]")
        visible = attention_mask != 0
        first = visible.int().argmax(-1)
        self._starts = torch.where(visible.any(-1), first, visible.shape[1])

    def forget(self) -> None:
        """Another prompt may follow."""
        self._starts = None

    def starts(self, batch: int) -> Tensor | None:
        """Int64 ``[batch]``, or None when nothing was told about this many sequences."""
        return self._starts if self._starts is not None and len(self._starts) == batch else None
