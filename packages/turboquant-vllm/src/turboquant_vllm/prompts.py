"""Attention of new tokens: over their own keys and values as they came, and over what the pages held before."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from turboquant_core import Attended, CacheCodec, KernelProvider

from .exact_context import ExactContext
from .merging import merge_into
from .plan import PromptPlan, PromptRow
from .raw_attention import RawAttention, Scoring


@dataclass(frozen=True, slots=True)
class PromptAttention:
    """Prompts of one layer.

    Attributes:
        attention: over keys and values that are not packed.
        scoring: of the layer.
        provider: reads the pages.
        codec: of the pages.
        pages: uint8 ``codec.layout.pages_shape(num_pages)``.
        sinks: float ``[q_heads]`` or None.
        exact: first and recent tokens in full precision; None where pages have none.
    """

    attention: RawAttention
    scoring: Scoring
    provider: KernelProvider
    codec: CacheCodec
    pages: Tensor
    sinks: Tensor | None
    exact: ExactContext | None = None

    def attend_raw(self, query: Tensor, key: Tensor, value: Tensor, plan: PromptPlan, out: Tensor) -> None:
        """New tokens see one another as they came, and the context from the pages.

        Args:
            query: ``[tokens, q_heads, head_dim]``, the prompt tokens of the step.
            key: ``[tokens, kv_heads, head_dim]``.
            value: the same.
            plan: of the step.
            out: ``[tokens, q_heads, head_dim]``, written.
        """
        lse = self.attention(query, key, value, plan.bounds, plan.bounds, self.scoring, causal=True, out=out).lse
        # Most prompts have no context, and the host is what a short one waits for.
        for row in (row for row in plan.rows if row.context):
            part = slice(row.first, row.last)
            if self.scoring.window is not None:
                own = self._windowed(query[part], key[part], value[part], row, plan)
                out[part], lse[part] = own.out, own.lse
            else:
                self._add_context(query[part], out[part], lse[part], row, plan)
        self._add_sinks(out, lse)

    def attend_packed(self, query: Tensor, plan: PromptPlan, out: Tensor) -> None:
        """New tokens see everything from the pages, themselves included; arguments as in :meth:`attend_raw`."""
        lse = query.new_empty(query.shape[:2], dtype=torch.float32)
        for row in plan.rows:
            part = slice(row.first, row.last)
            key, value = self._read(row, row.context, row.length, plan, query.dtype)
            if self.scoring.window is not None:
                own = self._windowed(query[part], key, value, row, plan)
                out[part], lse[part] = own.out, own.lse
                continue
            own_span = plan.span(row.last - row.first)
            own = self.attention(query[part], key, value, own_span, own_span, self.scoring, causal=True)
            out[part], lse[part] = own.out, own.lse
            self._add_context(query[part], out[part], lse[part], row, plan)
        self._add_sinks(out, lse)

    def attend_recent(self, query: Tensor, key: Tensor, value: Tensor, plan: PromptPlan, out: Tensor) -> None:
        """New tokens see what decoded ones see: recent tokens as they came, and older ones from the pages.

        Arguments as in :meth:`attend_raw`. A query at position ``p`` meets the codes of the tokens before ``p + 1 -
        recent``, so that its answer does not depend on how the prompt was cut or cached.
        """
        assert self.exact is not None
        lse = query.new_empty(query.shape[:2], dtype=torch.float32)
        scoring = replace(self.scoring, window=self.exact.recent)
        for row in plan.rows:
            part = slice(row.first, row.last)
            before = self.exact.last(row, plan)
            keys, values = torch.cat((before.keys, key[part])), torch.cat((before.values, value[part]))
            spans = plan.span(row.last - row.first), plan.span(keys.shape[0])
            own = self.attention(query[part], keys, values, *spans, scoring, causal=True)
            out[part], lse[part] = own.out, own.lse
            self._add_older(query[part], out[part], lse[part], row, plan, self.exact.recent)
        self._add_sinks(out, lse)

    def _add_older(
        self, query: Tensor, out: Tensor, lse: Tensor, row: PromptRow, plan: PromptPlan, recent: int
    ) -> None:
        """Add what lies ``recent`` and more before each query: the same causal pattern, ``recent`` further back."""
        older = replace(row, context=max(row.context - recent, 0))
        stop = row.length - recent
        if stop <= 0:
            return
        seeing = slice(query.shape[0] - (stop - older.context), None)
        key, value = self._read(row, older.context, stop, plan, query.dtype)
        span = plan.span(key.shape[0])
        seen = self.attention(query[seeing], key, value, span, span, self.scoring, causal=True)
        merge_into(out[seeing], lse[seeing], seen)
        self._add_context(query, out, lse, older, plan, last=False)

    def _add_context(
        self, query: Tensor, out: Tensor, lse: Tensor, row: PromptRow, plan: PromptPlan, *, last: bool = True
    ) -> None:
        for start, stop in row.pieces():
            key, value = self._read(row, start, stop, plan, query.dtype)
            if last and self.exact is not None:
                self.exact.put_last((key, value), row, start, plan)
            queries, keys = plan.span(query.shape[0]), plan.span(stop - start)
            seen = self.attention(query, key, value, queries, keys, self.scoring, causal=False)
            merge_into(out, lse, seen)

    def _windowed(self, query: Tensor, key: Tensor, value: Tensor, row: PromptRow, plan: PromptPlan) -> Attended:
        """Context and new tokens in one call: each query sees another part of the context."""
        start = max(row.context - (self.scoring.window or 0) + 1, 0)
        if start < row.context:
            before_key, before_value = self._read(row, start, row.context, plan, query.dtype)
            key, value = torch.cat((before_key, key)), torch.cat((before_value, value))
        queries, keys = plan.span(query.shape[0]), plan.span(key.shape[0])
        return self.attention(query, key, value, queries, keys, self.scoring, causal=True)

    def _read(
        self, row: PromptRow, start: int, stop: int, plan: PromptPlan, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Keys and values ``[stop - start, kv_heads, head_dim]`` of a sequence; its first ones may be exact."""
        table = plan.block_table[row.row : row.row + 1]
        keys, values = self.provider.gather(self.pages, table, self.codec, start=start, stop=stop, dtype=dtype)
        decoded = keys[0].transpose(0, 1), values[0].transpose(0, 1)
        if self.exact is not None:
            self.exact.put_first(decoded, row, start, plan)
        return decoded

    def _add_sinks(self, out: Tensor, lse: Tensor) -> None:
        if self.sinks is not None:
            # A sink only enlarges the denominator: exp(lse) / (exp(lse) + exp(sink)).
            out.mul_(torch.sigmoid(lse - self.sinks.float()).unsqueeze(-1).to(out.dtype))
