"""Attention over packed pages, one sequence at a time."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from ..arguments import check_device, check_integers, check_tensors
from ..codec import CacheCodec, check_center
from ..dense import attend_dense
from ..provider import Attended
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
    _check_pages(query, pages, block_table, seq_lens, codec)
    _check_options(query, codec, options)
    _check_rows(query, query_start_loc, seq_starts, seq_lens.shape[0])
    bounds = _query_bounds(query, seq_lens, query_start_loc)
    starts = [0] * len(bounds) if seq_starts is None else seq_starts.tolist()
    shape = (query.shape[0], query.shape[1], codec.layout.value.head_dim)
    out = _checked_out(out, query, shape)
    out.zero_()
    lse = query.new_full(shape[:2], -torch.inf, dtype=torch.float32)
    for row, ((first, last), seq_len) in enumerate(zip(bounds, seq_lens.tolist(), strict=True)):
        if seq_len == 0 and options.sinks is not None:
            lse[first:last] = options.sinks
        if seq_len == 0 or first == last:
            continue
        visible = _visible(last - first, seq_len, starts[row], options.window, query.device)
        result = _attend_sequence(query[first:last], pages, block_table[row : row + 1], codec, options, visible)
        out[first:last], lse[first:last] = result.out.to(out.dtype), result.lse
    return Attended(out, lse)


def _attend_sequence(
    query: Tensor, pages: Tensor, block_row: Tensor, codec: CacheCodec, options: ScoreOptions, visible: Tensor
) -> Attended:
    seq_len = visible.shape[1]
    keys, values = gather(
        pages, block_row, codec, start=0, stop=seq_len, dtype=torch.float32, rotated=True, raw_dtype=query.dtype
    )
    rotated = rotate(query.to(torch.float32), codec.key.signs).transpose(0, 1).unsqueeze(0)
    output, lse = attend_dense(
        rotated,
        keys,
        values,
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
        if query.shape[0] % batch:
            raise ValueError(
                f"{query.shape[0]} query tokens do not divide by the batch of {batch}; pass query_start_loc"
            )
        step = query.shape[0] // batch
        return [(row * step, (row + 1) * step) for row in range(batch)]
    loc = query_start_loc.tolist()
    if len(loc) != batch + 1 or loc[0] != 0 or loc[-1] > query.shape[0] or loc != sorted(loc):
        raise ValueError(
            f"query_start_loc is {loc}; it must rise from 0 to at most {query.shape[0]} in {batch + 1} entries"
        )
    return list(itertools.pairwise(loc))


def _checked_out(out: Tensor | None, query: Tensor, shape: tuple[int, int, int]) -> Tensor:
    if out is None:
        return query.new_empty(shape)
    check_device(query.device, "query", out=out)
    if tuple(out.shape) != shape or out.dtype != query.dtype:
        raise ValueError(f"out is {out.dtype} {tuple(out.shape)}; it must be {query.dtype} {shape}")
    return out


def _check_query(query: Tensor, codec: CacheCodec) -> None:
    layout = codec.layout
    check_tensors(query=query)
    if not query.is_floating_point():
        raise ValueError(f"query is {query.dtype}; it must be a floating-point tensor")
    fits = query.dim() == 3 and query.shape[2] == layout.key.head_dim
    if not fits or query.shape[1] % layout.kv_heads or query.shape[1] == 0:
        raise ValueError(
            f"query has shape {tuple(query.shape)}; it must be [tokens, q_heads (a multiple of {layout.kv_heads}), "
            f"head_dim = {layout.key.head_dim}]"
        )
    check_device(codec.key.device, "the codec", query=query)


def _check_pages(query: Tensor, pages: Tensor, block_table: Tensor, seq_lens: Tensor, codec: CacheCodec) -> None:
    layout = codec.layout
    check_device(query.device, "query", pages=pages, block_table=block_table, seq_lens=seq_lens)
    check_pages(pages, layout)
    check_integers(block_table=block_table, seq_lens=seq_lens)
    if seq_lens.dim() != 1 or seq_lens.shape[0] == 0:
        raise ValueError(f"seq_lens has shape {tuple(seq_lens.shape)}; it must be [batch] with batch at least 1")
    if block_table.dim() != 2 or block_table.shape[0] != seq_lens.shape[0]:
        raise ValueError(
            f"block_table has shape {tuple(block_table.shape)}; it must be [{seq_lens.shape[0]}, max_pages]"
        )
    if int(seq_lens.max()) > block_table.shape[1] * layout.page_size:
        raise ValueError(
            f"a sequence has {int(seq_lens.max())} tokens; the block table holds "
            f"{block_table.shape[1]} pages of {layout.page_size}"
        )
    if int(seq_lens.min()) < 0:
        raise ValueError(f"a sequence has {int(seq_lens.min())} tokens; lengths start at 0")


def _check_rows(query: Tensor, query_start_loc: Tensor | None, seq_starts: Tensor | None, batch: int) -> None:
    check_device(query.device, "query", query_start_loc=query_start_loc, seq_starts=seq_starts)
    check_integers(query_start_loc=query_start_loc, seq_starts=seq_starts)
    if seq_starts is not None and tuple(seq_starts.shape) != (batch,):
        raise ValueError(f"seq_starts has shape {tuple(seq_starts.shape)}; it must be [batch = {batch}]")


def _check_options(query: Tensor, codec: CacheCodec, options: ScoreOptions) -> None:
    check_center(codec, options.softcap, options.sinks)
    check_device(query.device, "query", sinks=options.sinks)
    if options.window is not None and options.window < 1:
        raise ValueError(f"window is {options.window}; it must be at least 1 or None")
    if options.softcap is not None and options.softcap <= 0:
        raise ValueError(f"softcap is {options.softcap}; it must be positive or None")
    if options.sinks is not None and options.sinks.shape != query.shape[1:2]:
        raise ValueError(f"sinks have shape {tuple(options.sinks.shape)}; they must be [q_heads = {query.shape[1]}]")
