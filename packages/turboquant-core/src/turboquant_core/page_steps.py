"""What steps of one token take from the device besides vectors, made for all the tokens of a page at once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_ALIGNMENT = 16
"""Bytes. Kernels are compiled anew for pointers that are no multiples of them."""


class PageSteps(NamedTuple):
    """Page ``page`` of every sequence, where page ``p`` of sequence ``b`` is page ``p * batch + b`` of the pool.

    Attributes:
        page: which.
        slots: int64 ``[batch]`` for each token of the page: where it lies.
        seq_lens: int32 ``[batch]`` for each: tokens of a sequence that ends with it.
    """

    page: int
    slots: tuple[Tensor, ...]
    seq_lens: tuple[Tensor, ...]

    @classmethod
    def of(cls, page: int, batch: int, page_size: int, device: torch.device) -> PageSteps:
        """Make them on ``device``."""
        first, size = page * batch * page_size, batch * page_size
        slots = torch.arange(first, first + size, device=device).view(batch, page_size)
        ends = torch.arange(page * page_size + 1, (page + 1) * page_size + 1, dtype=torch.int32, device=device)
        return cls(page, _rows(slots), _rows(ends.expand(batch, page_size)))


def _rows(columns: Tensor) -> tuple[Tensor, ...]:
    """Columns of ``[batch, page_size]``, each contiguous and aligned."""
    batch, page_size = columns.shape
    fits = _ALIGNMENT // columns.itemsize
    rows = columns.new_empty(page_size, -(-batch // fits) * fits)[:, :batch]
    return rows.copy_(columns.t()).unbind(0)


NO_STEPS = PageSteps(-1, (), ())
"""Of no page."""
