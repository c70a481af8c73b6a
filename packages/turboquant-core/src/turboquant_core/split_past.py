"""Attention over tokens of which the first and the most recent ones are exact and all others packed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from .codec import CacheCodec
from .dense import attend_dense
from .merge import merge_attended
from .packed_sequences import PackedPast
from .provider import Attended, Gathered
from .sink_tokens import SinkTokens
from .token_step import attend_tokens, joined


class SplitPast(ABC):
    """What windowed sequences hold at one moment; see :class:`PackedPast`.

    Attributes:
        packed: the pages.
        sinks: the first visible tokens.
    """

    __slots__ = ()

    packed: PackedPast
    sinks: SinkTokens

    @property
    @abstractmethod
    def length(self) -> int:
        """Tokens of each sequence that can be read."""

    @property
    @abstractmethod
    def end(self) -> int | Tensor:
        """Position after the last token: ``length``, or less of it where room is left; int or int64 scalar."""

    @property
    @abstractmethod
    def border(self) -> int | Tensor:
        """Position of the first token that is read from the recent window; at most ``end``."""

    @property
    @abstractmethod
    def recent_tokens(self) -> int:
        """Tokens of the recent window, room included."""

    @abstractmethod
    def recent_at(self) -> tuple[Gathered, Tensor]:
        """Keys and values ``[batch, kv_heads, n, d]`` of the recent window and the int64 positions ``[n]`` of them.

        A position from ``end`` on stands for none.
        """

    @abstractmethod
    def read(self, start: int, stop: int, dtype: torch.dtype) -> Gathered:
        """As :meth:`PackedPast.read`; tokens in a window are exact."""

    @property
    def codec(self) -> CacheCodec:
        """Codecs of the packed tokens."""
        return self.packed.codec

    @property
    def batch(self) -> int:
        """Sequences."""
        return self.packed.block_table.shape[0]

    @property
    def device(self) -> torch.device:
        """Where everything is."""
        return self.packed.pages.device

    def attend(
        self,
        query: Tensor,
        *,
        scaling: float,
        seq_starts: Tensor | None = None,
        latest_start: int | None = None,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Attended:
        """As :meth:`PackedPast.attend`: packed and exact tokens apart, merged by log-sum-exp.

        ``latest_start`` is the largest of ``seq_starts``, where the host knows it: it saves one query most operations.
        """
        self.packed.check_query(query, self.length)
        if not self.sinks.count and not self.recent_tokens:
            return self._attend_pages(query, seq_starts, window, scaling=scaling, softcap=softcap, sinks=sinks)
        options: dict[str, Any] = {"scaling": scaling, "softcap": softcap}
        latest_start = 0 if seq_starts is None else latest_start
        is_plain = window is None and query.shape[2] == 1 and latest_start is not None
        recent = self.plain_recent(latest_start or 0) if is_plain else None
        if recent is not None:
            starts = self.sinks.stop if self.sinks.count else seq_starts
            packed = self.packed.attend(query, seq_starts=starts, **options)
            return self._add_exact(packed, query, recent, None, sinks=sinks, **options)
        starts = torch.zeros_like(self.sinks.starts) if seq_starts is None else seq_starts.to(self.sinks.starts)
        if isinstance(self.border, int) and self.border == 0:
            return self._attend_exact(query, starts, window, sinks=sinks, **options)
        packed = self._attend_packed(query, starts, window, **options)
        if query.shape[2] > 1:
            return merge_attended(packed, self._attend_exact(query, starts, window, sinks=sinks, **options))
        recent, recent_at = self.recent_at()
        visible = self._visible(recent_at, starts, window, 1).squeeze(1)
        return self._add_exact(packed, query, recent, visible, sinks=sinks, **options)

    def plain_recent(self, latest_start: int) -> Gathered | None:
        """The recent tokens, if the last query sees all sinks, a packed token after them, and these; None otherwise.

        Args:
            latest_start: largest first visible position.
        """
        return None

    def query_positions(self, q_len: int) -> Tensor:
        """Positions int64 ``[q_len]`` of queries that stand at the end."""
        return self.end - q_len + torch.arange(q_len, device=self.device)

    def _add_exact(
        self, packed: Attended, query: Tensor, recent: Gathered, visible: Tensor | None, **options: Any
    ) -> Attended:
        """``packed`` attention of one query token with the exact tokens that ``visible`` shows; None for all."""
        provider, center = self.packed.provider, self.codec.key.center
        return attend_tokens(provider, packed, query, self._runs(recent), center=center, visible=visible, **options)

    def _attend_exact(
        self,
        query: Tensor,
        starts: Tensor,
        window: int | None,
        *,
        scaling: float,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Attended:
        """Over the sinks that are not recent too, and the recent tokens."""
        recent, recent_at = self.recent_at()
        visible = self._visible(recent_at, starts, window, query.shape[2])
        keys, values = joined(self._runs(recent), self.codec.key.center)
        out, lse = attend_dense(query, keys, values, visible, scaling=scaling, softcap=softcap, sinks=sinks)
        return Attended(out.to(query.dtype), lse)

    def _runs(self, recent: Gathered) -> tuple[Gathered, ...]:
        """Exact tokens: the sinks, where there are any, and the ``recent`` window."""
        return (self.sinks.kept, recent) if self.sinks.count else (recent,)

    def _visible(self, recent_at: Tensor, starts: Tensor, window: int | None, q_len: int) -> Tensor:
        """Bool ``[batch, q_len, sinks + recent]``."""
        first = self.sinks.positions()
        # A sink that has not left the recent window would count twice.
        first = torch.where(first < self.border, first, self.length)
        key = torch.cat((first, recent_at.expand(len(starts), -1)), 1).unsqueeze(1)
        query = self.query_positions(q_len).view(1, -1, 1)
        visible = (key <= query) & (key >= starts.view(-1, 1, 1))
        return visible if window is None else visible & (key > query - window)

    def _attend_packed(
        self, query: Tensor, starts: Tensor, window: int | None, *, scaling: float, softcap: float | None
    ) -> Attended:
        if self.sinks.count:
            starts = torch.maximum(starts, self.sinks.starts + self.sinks.count).clamp(max=self.border)
        if not self.recent_tokens:
            return self._attend_pages(query, starts.int(), window, scaling=scaling, softcap=softcap, sinks=None)
        # Queries stand beyond the last packed token, each at its own distance: each is a sequence of its own.
        positions = self.query_positions(query.shape[2])
        lengths = (positions + 1).clamp(max=self.border).repeat(len(starts))
        first = starts.repeat_interleave(query.shape[2])
        if window is not None:
            first = torch.maximum(first, (positions - window + 1).repeat(len(starts)))
        return self.packed.attend_rows(
            query, lengths.int(), torch.minimum(first, lengths).int(), scaling=scaling, softcap=softcap
        )

    def _attend_pages(
        self,
        query: Tensor,
        starts: Tensor | None,
        window: int | None,
        *,
        scaling: float,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Attended:
        """Over everything, which is packed; sinks (tokens) are excluded by ``starts``."""
        return self.packed.attend(
            query, end=self.end, scaling=scaling, seq_starts=starts, window=window, softcap=softcap, sinks=sinks
        )
