"""A handle on its way through ``repeat_kv``, by which models give every query head keys and values of its own.

Packed attention reads the heads that there are, so that nothing needs to be repeated, and nothing decoded.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from .dense_operators import DenseOperators
from .reasons import changed


class Handle(Protocol):
    """What stands for keys or values ``[batch, heads, length, head_dim]``."""

    @property
    def shape(self) -> torch.Size:
        """As of the dense tensor."""

    @property
    def step(self) -> Any:
        """The past, which counts."""

    @property
    def kind(self) -> str:
        """``keys`` or ``values``."""

    @property
    def repeats(self) -> int:
        """Copies of each head."""

    def dense(self) -> Tensor:
        """The decoded tensor."""

    def repeated(self, repeats: int) -> Any:
        """Every head ``repeats`` times."""


def is_new_axis_of_heads(index: Any) -> bool:
    """Whether ``index`` is ``[:, :, None, :, :]``."""
    if not isinstance(index, tuple) or len(index) != 5 or index[2] is not None:
        return False
    return all(
        isinstance(part, slice) and part.start is None and part.stop is None and part.step is None
        for part in (*index[:2], *index[3:])
    )


def head_groups(handle: Handle, index: Any) -> HeadGroups | None:
    """What ``handle[index]`` is, if that is the first step of ``repeat_kv``."""
    return HeadGroups(handle) if is_new_axis_of_heads(index) else None


def sizes_of(sizes: tuple[Any, ...]) -> tuple[Any, ...]:
    """Sizes or axes given one by one or as one sequence."""
    return tuple(sizes[0]) if len(sizes) == 1 else sizes


class HeadGroups(DenseOperators):
    """``handle[:, :, None]``, expanded to ``repeats`` copies of each head; anything but ``repeat_kv`` decodes it."""

    def __init__(self, handle: Handle, repeats: int = 1) -> None:
        self._handle, self._repeats = handle, repeats

    @property
    def shape(self) -> torch.Size:
        """``[batch, heads, repeats, length, head_dim]``."""
        batch, heads, length, head_dim = self._handle.shape
        return torch.Size((batch, heads, self._repeats, length, head_dim))

    def expand(self, *sizes: Any) -> Any:
        """As of a tensor."""
        wanted = sizes_of(sizes)
        batch, heads, length, head_dim = self._handle.shape
        is_repeat_kv = len(wanted) == 5 and (*wanted[:2], *wanted[3:]) == (batch, heads, length, head_dim)
        if is_repeat_kv and wanted[2] > 0 and self._repeats == 1:
            return HeadGroups(self._handle, wanted[2])
        return self.dense().expand(*sizes)

    def reshape(self, *sizes: Any) -> Any:
        """As of a tensor."""
        batch, heads, length, head_dim = self._handle.shape
        if sizes_of(sizes) == (batch, heads * self._repeats, length, head_dim):
            return self._handle.repeated(self._repeats)
        return self.dense().reshape(*sizes)

    def dense(self) -> Tensor:
        """The decoded tensor, with its axis of copies."""
        self._handle.step.count_decoded(changed("a new axis"))
        return self._handle.dense().unsqueeze(2).expand(self.shape)

    def __getitem__(self, index: Any) -> Tensor:
        return self.dense()[index]
