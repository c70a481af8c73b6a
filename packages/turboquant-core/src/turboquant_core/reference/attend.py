"""Attention over packed pages, one sequence at a time."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from ..arguments import (
    check_device,
    check_out,
    check_query_shape,
    check_score_options,
    check_sequences,
    check_tensors,
)
from ..codec import CacheCodec, check_center
from ..dense import attend_dense
from ..layout import PageLayout
from ..provider import Attended, Gathered
from ..rotation import rotate, unrotate
from .pages import check_pages, gather


@dataclass(frozen=True, slots=True)
class ScoreOptions:
    """What happens to scores before the softmax (arguments of :meth:`KernelProvider.attend`)."""

    scaling: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None


def attend(
    query: Tensor,
    pages: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    codec: CacheCodec,
    options: ScoreOptions,
    query_start_loc: Tensor | None,
    seq_starts: Tensor | None,
    out: Tensor | None,
) -> Attended:
    """Reference of :meth:`KernelProvider.attend`."""
    _check_query(query, codec)
    check_device(query.device, "query", pages=pages, sinks=options.sinks)
    check_pages(pages, codec.layout)
    check_sequences(query, block_table, seq_lens, query_start_loc, seq_starts)
    _check_lengths(block_table, seq_lens, codec.layout)
    check_center(codec, options.softcap, options.sinks)
    check_score_options(query.shape[1], options.window, options.softcap, options.sinks)
    check_out(out, query, codec.layout)
    bounds = _query_bounds(query, seq_lens, query_start_loc)
    starts = [0] * len(bounds) if seq_starts is None else seq_starts.tolist()
    shape = (query.shape[0], query.shape[1], codec.layout.value.head_dim)
    out = query.new_empty(shape) if out is None else out
    out.zero_()
    lse = query.new_full(shape[:2], -torch.inf, dtype=torch.float32)
    lengths, tables = seq_lens.tolist(), block_table.tolist()
    for row, (first, last) in enumerate(bounds):
        if lengths[row] == 0 and options.sinks is not None:
            lse[first:last] = options.sinks
    asked = [row for row, (first, last) in enumerate(bounds) if lengths[row] > 0 and first < last]
    # Queries with ranges of their own come as rows that share pages: these are decoded once.
    for _, sharing in itertools.groupby(asked, tables.__getitem__):
        rows = list(sharing)
        stop = max(lengths[row] for row in rows)
        decoded = _decode_rotated(query, pages, block_table[rows[0] : rows[0] + 1], codec, stop)
        for row in rows:
            first, last = bounds[row]
            visible = _visible(last - first, lengths[row], starts[row], options.window, query.device)
            result = _attend_sequence(query[first:last], decoded, codec, options, visible)
            out[first:last], lse[first:last] = result.out.to(out.dtype), result.lse
    return Attended(out, lse)


def _decode_rotated(query: Tensor, pages: Tensor, block_row: Tensor, codec: CacheCodec, stop: int) -> Gathered:
    return gather(pages, block_row, codec, start=0, stop=stop, dtype=torch.float32, rotated=True, raw_dtype=query.dtype)


def _attend_sequence(
    query: Tensor, decoded: Gathered, codec: CacheCodec, options: ScoreOptions, visible: Tensor
) -> Attended:
    seq_len = visible.shape[1]
    rotated = rotate(query.to(torch.float32), codec.key.signs).transpose(0, 1).unsqueeze(0)
    output, lse = attend_dense(
        rotated,
        decoded.keys[:, :, :seq_len],
        decoded.values[:, :, :seq_len],
        visible.unsqueeze(0),
        scaling=options.scaling,
        softcap=options.softcap,
        sinks=options.sinks,
    )
    if codec.value is not None:
        output = unrotate(output, codec.value.signs)
    return Attended(output[0].transpose(0, 1), lse[0].transpose(0, 1))


def _visible(q_len: int, seq_len: int, start: int, window: int | None, device: torch.device) -> Tensor:
    """Bool ``[q_len, seq_len]``: which positions each of the last ``q_len`` queries sees."""
    key = torch.arange(seq_len, device=device)
    query = torch.arange(seq_len - q_len, seq_len, device=device).unsqueeze(1)
    visible = (key <= query) & (key >= start)
    return visible if window is None else visible & (key > query - window)


def _query_bounds(query: Tensor, seq_lens: Tensor, query_start_loc: Tensor | None) -> list[tuple[int, int]]:
    batch = seq_lens.shape[0]
    if query_start_loc is None:
        step = query.shape[0] // batch
        return [(row * step, (row + 1) * step) for row in range(batch)]
    loc = query_start_loc.tolist()
    if loc[0] != 0 or loc[-1] > query.shape[0] or loc != sorted(loc):
        raise ValueError(f"query_start_loc is {loc}; it must rise from 0 to at most {query.shape[0]}")
    return list(itertools.pairwise(loc))


def _check_query(query: Tensor, codec: CacheCodec) -> None:
    check_tensors(query=query)
    if not query.is_floating_point():
        raise ValueError(f"query is {query.dtype}; it must be a floating-point tensor")
    check_query_shape(query, codec.layout)
    check_device(codec.key.device, "the codec", query=query)


def _check_lengths(block_table: Tensor, seq_lens: Tensor, layout: PageLayout) -> None:
    if int(seq_lens.max()) > block_table.shape[1] * layout.page_size:
        raise ValueError(
            f"a sequence has {int(seq_lens.max())} tokens; the block table holds "
            f"{block_table.shape[1]} pages of {layout.page_size}"
        )
    if int(seq_lens.min()) < 0:
        raise ValueError(f"a sequence has {int(seq_lens.min())} tokens; lengths start at 0")
