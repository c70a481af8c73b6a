"""How the tiles of all sequences are dealt to a fixed number of programs, decided on the device.

A row is one sequence (or one query token when the query lengths differ), an item one (row, KV head, query chunk). All
items of a row have the same tiles, so that tile numbers run item after item, and program ``w`` of ``P`` takes tiles
``w * share .. (w + 1) * share - 1``: programs differ by at most one tile whatever the lengths. The part of an item that
a program computes is a piece; piece and program number grow together, so that ``item + program`` is a unique slot.

The plan is int32 ``[5, rows]``: inclusive prefix sum of tiles, batch entry, first tile, first visible token, end.
"""

from __future__ import annotations

import triton
import triton.language as tl

PLAN_FIELDS = tl.constexpr(5)


@triton.jit
def load_piece(plan, rows, tile, stop, ITEMS_PER_ROW: tl.constexpr, ROWS_BLOCK: tl.constexpr):
    """The piece that begins at ``tile``: (batch entry, item, first tile, last tile, start, end)."""
    row = 0
    for base in range(0, rows, ROWS_BLOCK):
        index = base + tl.arange(0, ROWS_BLOCK)
        ends = tl.load(plan + index, mask=index < rows, other=2147483647)
        row += tl.sum((ends <= tile).to(tl.int32), 0)
    before = tl.load(plan + row - 1, mask=row > 0, other=0)
    tiles = (tl.load(plan + row) - before) // ITEMS_PER_ROW
    local = tile - before
    skipped = tl.load(plan + 2 * rows + row)
    first = local % tiles
    last = tl.minimum(tiles, first + stop - tile)
    return (
        tl.load(plan + rows + row),
        row * ITEMS_PER_ROW + local // tiles,
        skipped + first,
        skipped + last,
        tl.load(plan + 3 * rows + row),
        tl.load(plan + 4 * rows + row),
    )


@triton.jit
def ragged_rows(row, query_start_loc, seq_lens, batch, BATCH_BLOCK: tl.constexpr):
    """Batch entry and visible end of each query token when the query lengths differ; end 0 for padding."""
    entry = tl.zeros_like(row)
    for base in range(0, batch, BATCH_BLOCK):
        index = base + tl.arange(0, BATCH_BLOCK)
        ends = tl.load(query_start_loc + index + 1, mask=index < batch, other=2147483647)
        entry += tl.sum((ends[None, :] <= row[:, None]).to(tl.int32), 1)
    real = entry < batch
    entry = tl.where(real, entry, 0)
    length = tl.load(seq_lens + entry)
    after = tl.load(query_start_loc + entry + 1) - 1 - row
    return entry, tl.where(real & (length > 0), tl.maximum(length - after, 0), 0)


@triton.jit
def write_plan(
    plan,
    seq_lens,
    seq_starts,
    query_start_loc,
    rows,
    batch,
    window,
    ITEMS_PER_ROW: tl.constexpr,
    Q_LEN: tl.constexpr,
    BLOCK: tl.constexpr,
    RAGGED: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    SKIP_FIRST: tl.constexpr,
    SKIP_LAST: tl.constexpr,
    ROWS_BLOCK: tl.constexpr,
):
    """Fill the plan; one program does it all."""
    before = 0
    for base in range(0, rows, ROWS_BLOCK):
        row = base + tl.arange(0, ROWS_BLOCK)
        inside = row < rows
        if RAGGED:
            entry, end = ragged_rows(row, query_start_loc, seq_lens, batch, 64)
        else:
            entry = row
            end = tl.load(seq_lens + row, mask=inside, other=0)
        if SKIP_LAST:
            end = tl.maximum(end - SKIP_LAST, 0)
        start = tl.zeros_like(row)
        if SKIP_FIRST:
            start += SKIP_FIRST
        if HAS_STARTS:
            start = tl.load(seq_starts + entry, mask=inside, other=0)
        first_seen = start
        if HAS_WINDOW:
            first_seen = tl.maximum(start, end - Q_LEN - window + 1)
        first_tile = first_seen // BLOCK
        tiles = tl.where(inside & (end > 0), tl.maximum(tl.cdiv(end, BLOCK) - first_tile, 0), 0) * ITEMS_PER_ROW
        tl.store(plan + row, before + tl.cumsum(tiles, 0), mask=inside)
        tl.store(plan + rows + row, entry, mask=inside)
        tl.store(plan + 2 * rows + row, first_tile, mask=inside)
        tl.store(plan + 3 * rows + row, start, mask=inside)
        tl.store(plan + 4 * rows + row, end, mask=inside)
        before += tl.sum(tiles, 0)
