"""Where tokens lie in pages."""

from __future__ import annotations

from torch import Tensor


def slots_at(block_table: Tensor, position: Tensor, page_size: int) -> Tensor:
    """Slots of token positions, ``page * page_size + offset``.

    Args:
        block_table: integer ``[..., max_pages]``, page of each ``page_size`` tokens of a sequence.
        position: integer ``[tokens]``.
        page_size: tokens of a page.

    Returns:
        int64 ``[..., tokens]``.
    """
    page: Tensor = block_table[..., position // page_size].long()
    return page * page_size + position % page_size
