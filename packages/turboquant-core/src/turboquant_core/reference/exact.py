"""Exact rows of pages: written and attended to in PyTorch, without a word from the host but for shapes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import check_device, check_integers
from ..codec import CacheCodec, check_center
from ..dense import attend_dense
from ..exact import exact_row, exact_views
from ..layout import PageLayout
from ..merge import merge_attended
from ..provider import Attended
from .pages import check_pages


def store_exact(key: Tensor, value: Tensor, pages: Tensor, slot_mapping: Tensor, layout: PageLayout) -> None:
    """Reference of :meth:`turboquant_core.exact.ExactRowsProvider.store_exact`; tokens may come in any order."""
    check_pages(pages, layout)
    check_device(pages.device, "the pages", key=key, value=value, slot_mapping=slot_mapping)
    check_integers(slot_mapping=slot_mapping)
    views = exact_views(pages, layout, key.dtype)
    kept = torch.nonzero(slot_mapping >= 0).squeeze(1)
    page, offset = slot_mapping[kept] // layout.page_size, slot_mapping[kept] % layout.page_size
    ring = layout.exact.ring
    parts = [(offset < layout.exact.first, offset)]
    if ring:
        parts.append((_is_last(page * ring + offset % ring, slot_mapping[kept]), layout.exact.first + offset % ring))
    for part, row in parts:
        for view, x in zip(views, (key, value), strict=True):
            view[page[part], :, row[part]] = x[kept[part]]


def _is_last(group: Tensor, slots: Tensor) -> Tensor:
    """Which of the tokens have the highest slot of their group; writing others too would leave the order to chance."""
    size = int(group.max()) + 1 if len(group) else 0
    highest = slots.new_full((size,), -1).scatter_reduce_(0, group, slots, "amax")
    return highest[group] == slots


def attend_exact(
    query: Tensor,
    pages: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    codec: CacheCodec,
    packed: Attended,
    *,
    recent: int,
    scaling: float,
    query_start_loc: Tensor | None,
    softcap: float | None,
) -> Attended:
    """Reference of :meth:`turboquant_core.exact.ExactRowsProvider.attend_exact`."""
    layout = codec.layout
    check_pages(pages, layout)
    check_center(codec, softcap, None)
    check_recent(query, seq_lens, layout, recent, query_start_loc)
    entry, position = query_positions(query.shape[0], seq_lens, query_start_loc)
    keys_at, visible = _seen(position, layout.exact.first, recent)
    page = block_table[entry.unsqueeze(1), torch.where(visible, keys_at, 0) // layout.page_size].long()
    page = torch.where(visible, page, 0)
    row = exact_row(keys_at, layout)
    keys, values = (view[page, :, row].transpose(1, 2) for view in exact_views(pages, layout, query.dtype))
    if codec.key.center is not None:
        # Packed scores lack the centre, and both parts must lack it to be merged.
        keys = keys.float() - codec.key.center.unsqueeze(1)
    out, lse = attend_dense(query.unsqueeze(2), keys, values, visible.unsqueeze(1), scaling=scaling, softcap=softcap)
    merged = merge_attended(packed, Attended(out.squeeze(2).to(packed.out.dtype), lse.squeeze(2)))
    packed.out.copy_(merged.out)
    packed.lse.copy_(merged.lse)
    return packed


def check_recent(
    query: Tensor, seq_lens: Tensor, layout: PageLayout, recent: int, query_start_loc: Tensor | None
) -> None:
    """Raise ``ValueError`` where the ring cannot hold what the queries see."""
    queries = query.shape[0] // max(seq_lens.shape[0], 1) if query_start_loc is None else 1
    if recent < 0 or (recent and recent + max(queries, 1) - 1 > layout.exact.ring):
        raise ValueError(
            f"recent is {recent} with {queries} queries a sequence; a ring of {layout.exact.ring} rows must hold the "
            "recent tokens of the first query and those after it"
        )


def query_positions(tokens: int, seq_lens: Tensor, query_start_loc: Tensor | None) -> tuple[Tensor, Tensor]:
    """Batch entry and position of each query, int64 ``[tokens]``; the position is negative for a padded query."""
    token = torch.arange(tokens, device=seq_lens.device)
    batch = seq_lens.shape[0]
    if query_start_loc is None:
        q_len = max(tokens // batch, 1)
        entry = token // q_len
        return entry, seq_lens.long()[entry] - q_len + token % q_len
    found = torch.searchsorted(query_start_loc[1:].long(), token, right=True)
    entry = found.clamp(max=batch - 1)
    length = seq_lens.long()[entry]
    position = length - query_start_loc.long()[entry + 1] + token
    return entry, torch.where((found < batch) & (length > 0), position, -1)


def _seen(position: Tensor, first: int, recent: int) -> tuple[Tensor, Tensor]:
    """Positions int64 ``[tokens, first + recent]`` of the exact tokens, and which of them each query sees."""
    device, last = position.device, position.unsqueeze(1)
    begin = torch.arange(first, device=device).expand(len(position), -1)
    end = last - torch.arange(recent - 1, -1, -1, device=device)
    visible = torch.cat((begin <= last, end >= first), 1)
    return torch.cat((begin, end.clamp(min=0)), 1), visible
