"""Which rows of a step are prompts, and how each is attended to."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .raw_attention import Bounds

PREFIX_TOKENS = 16384
"""Most tokens of a packed prefix that are decoded at a time: bounds the scratch memory of long prompts."""


@dataclass(frozen=True, slots=True)
class PromptRow:
    """New tokens of one sequence, as positions in the step's prompt tokens.

    Attributes:
        row: row of the block table.
        first: first new token.
        last: one past the last.
        context: tokens of the sequence that were in the pages before.
    """

    row: int
    first: int
    last: int
    context: int

    @property
    def length(self) -> int:
        """Tokens of the sequence, the new ones included."""
        return self.context + self.last - self.first

    def pieces(self) -> Iterator[tuple[int, int]]:
        """The context in ranges of at most :data:`PREFIX_TOKENS`."""
        for start in range(0, self.context, PREFIX_TOKENS):
            yield start, min(start + PREFIX_TOKENS, self.context)


@dataclass(frozen=True, slots=True)
class PromptPlan:
    """Every prompt row of a step.

    Attributes:
        first_token: where the prompt tokens begin in the step.
        tokens: how many they are.
        rows: the sequences.
        bounds: of the sequences.
        block_table: int32 ``[batch, max_pages]`` of the whole step.
    """

    first_token: int
    tokens: int
    rows: tuple[PromptRow, ...]
    bounds: Bounds
    block_table: Tensor
    _spans: dict[int, Bounds] = field(default_factory=dict)

    def span(self, length: int) -> Bounds:
        """Bounds of one sequence of ``length``, copied to the device once a step rather than once a layer."""
        if length not in self._spans:
            self._spans[length] = Bounds.single(length, self.block_table.device)
        return self._spans[length]


def prompt_plan(starts: list[int], lengths: list[int], block_table: Tensor, first_row: int) -> PromptPlan | None:
    """Plan the rows from ``first_row`` on; None when they hold no token.

    Args:
        starts: first token of each row of the step, and the number of tokens.
        lengths: tokens of each sequence, new ones included.
        block_table: int32 ``[batch, max_pages]``.
        first_row: rows before it are decoding.
    """
    origin = starts[first_row]
    rows = tuple(
        PromptRow(row, first - origin, last - origin, lengths[row] - (last - first))
        for row, (first, last) in enumerate(itertools.pairwise(starts))
        if row >= first_row and last > first
    )
    if not rows:
        return None
    host = (0, *(row.last for row in rows))
    bounds = Bounds(torch.tensor(host, dtype=torch.int32).to(block_table.device, non_blocking=True), host)
    return PromptPlan(origin, rows[-1].last, rows, bounds, block_table)
