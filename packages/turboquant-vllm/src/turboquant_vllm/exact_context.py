"""Exact tokens of what prompts continue, read from the pages around the moment that new tokens take them over."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from turboquant_core import Gathered, PageLayout
from turboquant_core.exact import read_exact

from .plan import PromptPlan, PromptRow


@dataclass(frozen=True, slots=True)
class ExactContext:
    """Exact tokens of the contexts of a step's prompts.

    New tokens take over rows of the page that a context ends in, which belongs to its sequence alone: its rows are read
    before. A context that ends with a page may end with one that another sequence writes in this very step (a prefix
    that both share): its rows are read after.

    Attributes:
        recent: tokens that are exact for a query, its own included; 0 for none.
        pages: uint8 ``layout.pages_shape(num_pages)``.
        layout: of the pages.
        held: what was read before, by row of the block table.
        dtype: of the rows.
    """

    recent: int
    pages: Tensor
    layout: PageLayout
    held: dict[int, Gathered]
    dtype: torch.dtype

    @classmethod
    def before_writing(
        cls, recent: int, pages: Tensor, layout: PageLayout, plan: PromptPlan, dtype: torch.dtype
    ) -> ExactContext:
        """Read what the tokens of the step will take over."""
        found = cls(recent, pages, layout, {}, dtype)
        for row in plan.rows:
            if row.context % layout.page_size:
                found.held[row.row] = found.last(row, plan)
        return found

    def last(self, row: PromptRow, plan: PromptPlan) -> Gathered:
        """The last tokens of a context, which its first new token sees exactly: ``[tokens, kv_heads, head_dim]``."""
        if row.row in self.held:
            return self.held[row.row]
        return self._read(row, self.start(row), row.context, plan)

    def start(self, row: PromptRow) -> int:
        """Position of the first of :meth:`last`."""
        return max(row.context + min(1 - self.recent, 0), 0)

    def put_first(self, decoded: tuple[Tensor, Tensor], row: PromptRow, start: int, plan: PromptPlan) -> None:
        """Replace decoded keys and values from position ``start`` on by the sequence's exact first tokens."""
        stop = min(self.layout.exact.first, start + decoded[0].shape[0])
        if start < stop:
            _replace(decoded, self._read(row, start, stop, plan), 0)

    def put_last(self, decoded: tuple[Tensor, Tensor], row: PromptRow, start: int, plan: PromptPlan) -> None:
        """Replace decoded keys and values from position ``start`` on by the context's exact last tokens."""
        begin, stop = max(self.start(row), start), start + decoded[0].shape[0]
        if begin < stop:
            skipped = begin - self.start(row)
            _replace(decoded, Gathered(*(x[skipped:][: stop - begin] for x in self.last(row, plan))), begin - start)

    def _read(self, row: PromptRow, start: int, stop: int, plan: PromptPlan) -> Gathered:
        table = plan.block_table[row.row]
        return read_exact(self.pages, table, self.layout, start=start, stop=stop, dtype=self.dtype)


def _replace(decoded: tuple[Tensor, Tensor], exact: Gathered, at: int) -> None:
    for old, new in zip(decoded, exact, strict=True):
        old[at : at + new.shape[0]] = new
