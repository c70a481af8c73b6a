"""Packed sequences whose first visible and most recent tokens stay in full precision."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .codec import CacheCodec
from .layout import PageLayout
from .packed_sequences import MemoryFigures, PackedPast, PackedSequences
from .provider import Gathered, KernelProvider
from .recent_tokens import RecentTokens
from .sink_tokens import SinkTokens
from .split_past import SplitPast

_SETTLE_EVERY = 64
"""Single steps after which the host asks once whether all sinks have come, if it does not know yet."""


@dataclass(frozen=True, slots=True)
class Windows:
    """How many tokens stay in full precision.

    Args:
        sink_tokens: first visible tokens of each sequence.
        recent_tokens: last tokens; a token is packed once, when it leaves this window.
        start_after: nothing is packed before a sequence has more tokens than this.

    Raises:
        ValueError: a number is negative.
    """

    sink_tokens: int = 0
    recent_tokens: int = 0
    start_after: int = 0

    def __post_init__(self) -> None:
        for name in self.__slots__:
            number = getattr(self, name)
            if type(number) is not int or number < 0:
                raise ValueError(f"{name} is {number!r}; it must be a number of tokens, 0 for none")

    def __bool__(self) -> bool:
        return bool(self.sink_tokens or self.recent_tokens or self.start_after)

    def unpacked(self, length: int, packed: int) -> int:
        """How many of the last tokens stay unpacked when there are ``length``, of which ``packed`` are packed."""
        if packed == 0 and length <= self.start_after:
            return length
        return min(self.recent_tokens, length - packed)


@dataclass(frozen=True, slots=True)
class WindowedPast(SplitPast):
    """What windowed sequences hold at one moment; see :class:`PackedPast`.

    Attributes:
        packed: all tokens but the recent ones.
        sinks: the first visible tokens.
        recent: keys and values ``[batch, kv_heads, length - packed.length, d]``.
    """

    packed: PackedPast
    sinks: SinkTokens
    recent: Gathered

    @property
    def length(self) -> int:
        """Tokens of each sequence."""
        return self.packed.length + self.recent_tokens

    @property
    def end(self) -> int:
        """As ``length``."""
        return self.length

    @property
    def border(self) -> int:
        """Packed tokens."""
        return self.packed.length

    @property
    def recent_tokens(self) -> int:
        """Tokens that are not packed."""
        return self.recent.keys.shape[2]

    def recent_at(self) -> tuple[Gathered, Tensor]:
        """See :meth:`SplitPast.recent_at`."""
        return self.recent, torch.arange(self.border, self.length, device=self.device)

    def plain_recent(self, latest_start: int) -> Gathered | None:
        """See :meth:`SplitPast.plain_recent`."""
        if not self.sinks.count:
            return self.recent if latest_start < self.border else None
        # Padding may hide sinks that nobody placed; sinks among fewer than the packed tokens leave one to be seen.
        return self.recent if not latest_start and self.sinks.are_settled(self.border - 1) else None

    def read(self, start: int, stop: int, dtype: torch.dtype) -> Gathered:
        """As :meth:`PackedPast.read`; tokens in a window are exact."""
        if not 0 <= start <= stop <= self.length:
            raise ValueError(f"range {start}..{stop} leaves the cache, which holds {self.length} tokens")
        first = min(start, self.border)
        old = self.sinks.overlay(self.packed.read(first, min(stop, self.border), dtype), first)
        recent = slice(max(start - self.border, 0), max(stop - self.border, 0))
        return Gathered(*(torch.cat((x, y[:, :, recent].to(dtype)), 2) for x, y in zip(old, self.recent, strict=True)))


class WindowedSequences:
    """As :class:`PackedSequences`, with windows of exact tokens.

    Args:
        packed: an empty store; owned from now on.
        windows: what stays exact.
    """

    def __init__(self, packed: PackedSequences, windows: Windows) -> None:
        self.packed = packed
        self.windows = windows
        self._start_over()

    def _start_over(self) -> None:
        lead = (self.packed.batch, self.layout.kv_heads, 0)
        self._hold(
            *(
                torch.zeros((*lead, vector.head_dim), dtype=self.packed.dtype, device=self.packed.device)
                for vector in (self.layout.key, self.layout.value)
            )
        )
        self.sinks = SinkTokens(self.windows.sink_tokens, *self.recent)

    def _hold(self, keys: Tensor, values: Tensor) -> None:
        self._recent = RecentTokens(Gathered(keys, values))

    @property
    def recent(self) -> Gathered:
        """Keys and values of the tokens that are not packed, ``[batch, kv_heads, tokens, d]``."""
        return self._recent.tokens

    @property
    def layout(self) -> PageLayout:
        """The page layout."""
        return self.packed.layout

    @property
    def codec(self) -> CacheCodec:
        """Codecs of the packed tokens."""
        return self.packed.codec

    @property
    def provider(self) -> KernelProvider:
        """Who packs and attends."""
        return self.packed.provider

    @property
    def batch(self) -> int:
        """Sequences."""
        return self.packed.batch

    @property
    def device(self) -> torch.device:
        """Where everything is."""
        return self.packed.device

    @property
    def length(self) -> int:
        """Tokens of each sequence."""
        return self.packed.length + self._recent.count

    def append(self, keys: Tensor, values: Tensor, seq_starts: Tensor | None = None) -> None:
        """Add tokens; pack those that leave the recent window.

        Args:
            keys: see :meth:`PackedSequences.append`.
            values: see :meth:`PackedSequences.append`.
            seq_starts: integer ``[batch]``, first visible position of each sequence (left padding), as far as it is
                known; a sequence without a visible token so far has the number of its tokens, these included.

        Raises:
            ValueError: wrong shape or dtype; nothing is added then.
        """
        if not self.windows:
            self.packed.append(keys, values)
            return
        self.packed.check(keys, values)
        length, held, new = self.length, self._recent.count, keys.shape[2]
        dtype = self.packed.dtype
        if keys.dtype != dtype or values.dtype != dtype:
            keys, values = keys.to(dtype), values.to(dtype)
        if not self.sinks.are_settled(length):
            self._take_sinks(keys, values, seq_starts)
        leaving = held + new - self.windows.unpacked(length + new, length - held)
        if held and new == leaving == 1 and not (keys.requires_grad or values.requires_grad):
            self.packed.add_rows(*self._recent.first(), 1)
            self._recent.advance(keys, values)
        elif leaving <= held:
            self._shift(leaving, keys, values)
        else:
            both = [torch.cat(pair, 2) for pair in zip(self.recent, (keys, values), strict=True)]
            self.packed.add(*(x[:, :, :leaving] for x in both))
            # A view would keep the whole prompt alive.
            self._hold(*(x[:, :, leaving:].clone() for x in both))

    def _take_sinks(self, keys: Tensor, values: Tensor, seq_starts: Tensor | None) -> None:
        length = self.length
        self.sinks.place(seq_starts, length)
        self.sinks.take(keys, values, length)
        # Not in each step: the host would wait for the device.
        if keys.shape[2] > 1 or length % _SETTLE_EVERY == 0:
            self.sinks.settle(length + keys.shape[2])

    def _shift(self, leaving: int, keys: Tensor, values: Tensor) -> None:
        """Pack the first ``leaving`` recent tokens and add new ones, with no copy but the window's own."""
        recent: tuple[Tensor, ...] = self.recent
        if leaving:
            parts = [torch.split_with_sizes(x, (leaving, x.shape[2] - leaving), 2) for x in recent]
            self.packed.add(*(first for first, _ in parts))
            recent = tuple(rest for _, rest in parts)
        self._hold(*(torch.cat(pair, 2) for pair in zip(recent, (keys, values), strict=True)))

    def adopt_exact(
        self, recent_keys: Tensor, recent_values: Tensor, sink_keys: Tensor, sink_values: Tensor, sink_starts: Tensor
    ) -> None:
        """Take over the exact tokens of another store like this one, on this store's device.

        Raises:
            ValueError: a tensor has not the shape or dtype that this store needs.
        """
        recent, sinks = Gathered(recent_keys, recent_values), Gathered(sink_keys, sink_values)
        self.packed.check(*recent)
        fits = recent.keys.shape[2] <= max(self.windows.recent_tokens, self.windows.start_after)
        same = all(
            x.shape == y.shape
            for x, y in zip((*sinks, sink_starts), (*self.sinks.kept, self.sinks.starts), strict=True)
        )
        if not fits or not same or sink_starts.is_floating_point():
            raise ValueError(f"exact tokens {tuple(recent_keys.shape)} and sinks {tuple(sink_keys.shape)} do not fit")
        self._hold(*(x.to(self.packed.device, self.packed.dtype) for x in recent))
        self.sinks = self.sinks.holding(sink_starts, sinks)
        self.sinks.settle(self.length)

    def past(self) -> WindowedPast:
        """What is held now."""
        return WindowedPast(self.packed.past(), self.sinks.snapshot(), self.recent)

    def crop(self, length: int) -> None:
        """Keep the first ``length`` tokens; those that are packed stay so.

        Raises:
            ValueError: ``length`` is negative or more than is held.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot crop to {length} tokens: the cache holds {self.length}")
        border = min(self.packed.length, length)
        self.sinks.unsettle(length)
        self._hold(*(x[:, :, : length - border].clone() for x in self.recent))
        self.packed.crop(border)

    def drop(self, pages: int) -> None:
        """Forget the first ``pages`` packed pages: see :meth:`PackedSequences.drop`; not together with sinks.

        Raises:
            ValueError: there are sinks, or not that many pages are full.
        """
        if self.sinks.count:
            raise ValueError(f"the first {self.sinks.count} tokens are sinks, which stay: nothing can be dropped")
        self.packed.drop(pages)

    def select(self, indices: Tensor) -> None:
        """See :meth:`PackedSequences.select`."""
        indices = indices.to(self.packed.device)
        self.packed.select(indices)
        self._hold(*(x.index_select(0, indices) for x in self.recent))
        self.sinks = self.sinks.select(indices)

    def memory(self) -> MemoryFigures:
        """True bytes: pages, and the exact tokens of both windows (sinks are packed too)."""
        exact, sinks = self._recent.nbytes, self.sinks.nbytes
        return self.packed.memory() + MemoryFigures(exact + sinks, self._recent.allocated + sinks, exact)

    def reset(self) -> None:
        """Forget every token and free the pages."""
        self.packed.reset()
        self._start_over()

    def move(self, device: torch.device | str) -> None:
        """Move everything to ``device``: see :meth:`PackedSequences.move`."""
        self.packed.move(device)
        self._hold(*(x.to(device) for x in self.recent))
        self.sinks = self.sinks.to(device)
