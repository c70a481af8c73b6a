"""Attention over pages whose first and most recent tokens are read in full precision.

Such a page carries, beside its packed tokens, exact rows (:class:`turboquant_core.layout.ExactRows`): its first tokens,
and its last ones in a ring. They follow from the tokens of the page alone, like its codes: a page that is shared, moved
or written again answers alike. What is read from where follows from a query's position ``p`` alone, too:

- tokens ``0 .. first - 1`` of the sequence and the last ``recent``, ``p`` included, from exact rows;
- those between from their codes.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from .codec import CacheCodec
from .layout import PageLayout
from .provider import Attended, Gathered, KernelProvider, KernelRequest


@runtime_checkable
class ExactRowsProvider(KernelProvider, Protocol):
    """A provider that also writes and reads exact rows. No operation waits for the device."""

    def store_exact(self, key: Tensor, value: Tensor, pages: Tensor, slot_mapping: Tensor, layout: PageLayout) -> None:
        """Copy keys and values into the exact rows of their pages; no other byte of ``pages`` changes.

        A row that several tokens of the call fall to keeps the last of them.

        Args:
            key: ``[tokens, kv_heads, head_dim]`` of ``layout.exact.itemsize`` bytes a coordinate.
            value: ``[tokens, kv_heads, value_head_dim]`` of the same dtype.
            pages: uint8 of shape ``layout.pages_shape(num_pages)``.
            slot_mapping: integer ``[tokens]`` as in :meth:`KernelProvider.store`; the tokens of one page in ascending
                order, without a gap.
            layout: of the pages.
        """
        ...

    def attend_between(
        self,
        query: Tensor,
        pages: Tensor,
        block_table: Tensor,
        seq_lens: Tensor,
        codec: CacheCodec,
        *,
        skip_first: int,
        skip_last: int,
        scaling: float,
        query_start_loc: Tensor | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        out: Tensor | None = None,
        workspace: Tensor | None = None,
    ) -> Attended:
        """:meth:`KernelProvider.attend` of a query at position ``p`` to the tokens ``skip_first .. p - skip_last``.

        Tokens are skipped, not masked: a page of which no token is seen is not read.
        """
        ...

    def attend_exact(
        self,
        query: Tensor,
        pages: Tensor,
        block_table: Tensor,
        seq_lens: Tensor,
        codec: CacheCodec,
        packed: Attended,
        *,
        recent: int,
        scaling: float,
        query_start_loc: Tensor | None = None,
        softcap: float | None = None,
    ) -> Attended:
        """Add to ``packed``, in place, attention over the exact tokens that each query sees.

        Args:
            query: as in :meth:`KernelProvider.attend`; a sequence has at most ``ring - recent + 1`` queries, or any
                number with ``recent`` 0.
            pages: as there.
            block_table: as there.
            seq_lens: as there: all tokens of a sequence, those of the queries included.
            codec: of the pages; exact keys lose its centre when they are read.
            packed: attention of the same queries over the codes of the tokens between, sinks included.
            recent: tokens that are exact, the query's own included; 0 for none.
            scaling: multiplier of ``Q K^T``.
            query_start_loc: as in :meth:`KernelProvider.attend`.
            softcap: as there.

        Raises:
            ValueError: arguments do not fit one another, or the ring holds fewer than ``recent`` tokens.
        """
        ...


def exact_rows_reason(request: KernelRequest) -> str | None:
    """Why no provider can serve the exact rows of ``request``; None when it has none, or they fit its dtype."""
    exact = request.layout.exact
    if exact.rows == 0 or exact.itemsize == request.dtype.itemsize:
        return None
    return f"exact rows have {exact.itemsize} bytes a coordinate, {request.dtype} has {request.dtype.itemsize}"


def attend_with_exact(
    provider: ExactRowsProvider,
    query: Tensor,
    pages: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    codec: CacheCodec,
    *,
    recent: int,
    scaling: float,
    query_start_loc: Tensor | None = None,
    softcap: float | None = None,
    **options: Any,
) -> Attended:
    """Causal attention of the last tokens of each sequence, its first ``exact.first`` and ``recent`` tokens exact.

    Args:
        provider: reads codes and exact rows.
        query: as in :meth:`KernelProvider.attend`, like the following.
        pages: of ``codec.layout``.
        block_table: int32 ``[batch, max_pages]``.
        seq_lens: int32 ``[batch]``, 0 for a padded row.
        codec: the layer's codecs.
        recent: see :meth:`ExactRowsProvider.attend_exact`.
        scaling: multiplier of ``Q K^T``.
        query_start_loc: first query of each sequence, or None.
        softcap: see :meth:`KernelProvider.attend`.
        options: ``sinks``, ``out`` and ``workspace`` of :meth:`KernelProvider.attend`.

    Returns:
        As :meth:`KernelProvider.attend`.

    Raises:
        ValueError: see both operations.
    """
    common: dict[str, Any] = {"scaling": scaling, "query_start_loc": query_start_loc, "softcap": softcap}
    between = provider.attend_between(
        query,
        pages,
        block_table,
        seq_lens,
        codec,
        skip_first=codec.layout.exact.first,
        skip_last=recent,
        **common,
        **options,
    )
    return provider.attend_exact(query, pages, block_table, seq_lens, codec, between, recent=recent, **common)


def read_exact(
    pages: Tensor, block_row: Tensor, layout: PageLayout, *, start: int, stop: int, dtype: torch.dtype
) -> Gathered:
    """Exact keys and values at positions ``start .. stop - 1`` of one sequence.

    Positions below ``exact.first`` come from the rows of first tokens, others from the ring, which must still hold
    them: the last ``exact.ring`` tokens written to a page.

    Args:
        pages: uint8 of shape ``layout.pages_shape(num_pages)``.
        block_row: integer ``[max_pages]``.
        layout: of the pages.
        start: first position.
        stop: one past the last position.
        dtype: of the rows.

    Returns:
        Keys ``[stop - start, kv_heads, head_dim]`` and values ``[stop - start, kv_heads, value_head_dim]``.
    """
    position = torch.arange(start, stop, device=pages.device)
    page = block_row[position // layout.page_size].long()
    keys, values = exact_views(pages, layout, dtype)
    row = exact_row(position, layout)
    return Gathered(keys[page, :, row], values[page, :, row])


def exact_row(position: Tensor, layout: PageLayout) -> Tensor:
    """Exact row in its page of the token at each position of a sequence."""
    exact = layout.exact
    return torch.where(position < exact.first, position, exact.first + position % layout.page_size % max(exact.ring, 1))


def exact_views(pages: Tensor, layout: PageLayout, dtype: torch.dtype) -> Gathered:
    """Exact rows of all pages, sharing their storage.

    Returns:
        Keys ``[num_pages, kv_heads, rows, head_dim]`` and values ``[num_pages, kv_heads, rows, value_head_dim]``.

    Raises:
        ValueError: ``dtype`` has another size than the layout's exact rows.
    """
    exact, start, middle = layout.exact, layout.exact_key_offset, layout.exact_value_offset
    if dtype.itemsize != exact.itemsize:
        raise ValueError(f"exact rows have {exact.itemsize} bytes a coordinate; they cannot hold {dtype}")
    end = middle + exact.rows * layout.value.head_dim * exact.itemsize
    keys = pages[..., start:middle].view(dtype).unflatten(-1, (exact.rows, layout.key.head_dim))
    return Gathered(keys, pages[..., middle:end].view(dtype).unflatten(-1, (exact.rows, layout.value.head_dim)))
