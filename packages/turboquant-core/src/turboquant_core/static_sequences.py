"""Packed keys and values of one layer in pages that are there from the start, written in place.

Nothing changes its shape or its address, and lengths stay on the device: a step over them is one graph for
``torch.compile``, and a CUDA graph may record it. Every token is packed when it comes; a recent window keeps exact
copies besides, so that attention reads what :class:`turboquant_core.WindowedSequences` would read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .codec import CacheCodec
from .device_checks import require_before
from .layout import PageLayout
from .packed_sequences import MemoryFigures, PackedPast, check_appended, token_major
from .provider import Gathered, KernelProvider
from .recent_ring import RecentRing
from .sink_tokens import SinkTokens
from .slots import slots_at
from .split_past import SplitPast
from .windows import Windows


def _next_slots(filled: Tensor, block_table: Tensor, tokens: int, page_size: int, capacity: int) -> Tensor:
    """Slots int64 ``[batch * tokens]`` of the coming tokens of every sequence; the last ``tokens`` positions.

    Raises:
        ValueError: they do not fit; see :func:`turboquant_core.device_checks.require`.
    """
    position = filled + torch.arange(tokens, device=filled.device)
    # What does not fit is looked up before it is refused.
    slots = slots_at(block_table, position.clamp(max=capacity - 1), page_size).flatten()
    require_before(
        slots,
        filled + tokens <= capacity,
        f"the static cache has room for {capacity} tokens, which {tokens} more exceed: make it with more room",
    )
    return slots


@dataclass(frozen=True, slots=True)
class StaticPast(SplitPast):
    """What static sequences hold; later appends change it.

    Attributes:
        packed: all pages, room included.
        sinks: the first visible tokens.
        recent: the last tokens.
        filled: int64 scalar, tokens of each sequence.
        exact_from: int64 scalar, position of the first token that is read from ``recent``.
    """

    packed: PackedPast
    sinks: SinkTokens
    recent: RecentRing
    filled: Tensor
    exact_from: Tensor

    @property
    def length(self) -> int:
        """Tokens that each sequence has room for; what is beyond ``end`` must be masked."""
        return self.packed.length

    @property
    def end(self) -> Tensor:
        """Tokens of each sequence, on the device."""
        return self.filled

    @property
    def border(self) -> Tensor:
        """Position of the first token of the recent window, on the device."""
        return self.exact_from if self.recent.size else self.filled

    @property
    def recent_tokens(self) -> int:
        """Room of the recent window."""
        return self.recent.size

    def recent_at(self) -> tuple[Gathered, Tensor]:
        """See :meth:`SplitPast.recent_at`."""
        position = self.recent.positions(self.filled)
        return self.recent.rows, torch.where(position >= self.exact_from, position, self.length)

    def read(self, start: int, stop: int, dtype: torch.dtype) -> Gathered:
        """As :meth:`PackedPast.read`; tokens in a window are exact, positions beyond ``end`` hold anything finite."""
        decoded = self.sinks.overlay(self.packed.read(start, stop, dtype), start)
        return self.recent.overlay(decoded, start, self.border, self.filled)


class StaticSequences:
    """Pages of one layer for a fixed number of tokens.

    Page ``p`` of sequence ``b`` is page ``p % held * batch + b`` of the pool; ``held`` pages have ``room`` tokens.

    Args:
        batch: sequences.
        codec: codecs of the layer, on the device of the pages.
        provider: who packs and attends.
        dtype: of keys and values handed in.
        capacity: tokens that a sequence may have.
        windows: what stays exact.
        room: tokens that stay readable, where that is fewer than all (a sliding window); None for all.

    Raises:
        ValueError: ``batch`` or ``capacity`` is below 1.
    """

    def __init__(
        self,
        batch: int,
        codec: CacheCodec,
        provider: KernelProvider,
        dtype: torch.dtype,
        capacity: int,
        windows: Windows | None = None,
        *,
        room: int | None = None,
    ) -> None:
        if batch < 1 or capacity < 1:
            raise ValueError(f"batch is {batch} and capacity {capacity}; both must be at least 1")
        self.codec, self.provider, self.dtype, self.capacity = codec, provider, dtype, capacity
        self.windows = windows or Windows()
        layout, device = codec.layout, codec.key.device
        self.held = layout.pages_for(min(room or capacity, capacity))
        self.pages = torch.zeros(layout.pages_shape(self.held * batch), dtype=torch.uint8, device=device)
        page = torch.arange(layout.pages_for(capacity), dtype=torch.int32, device=device) % self.held
        self.block_table = page * batch + torch.arange(batch, dtype=torch.int32, device=device).unsqueeze(1)
        self.filled, self.exact_from = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(2))
        size = min(max(self.windows.recent_tokens, self.windows.start_after), capacity)
        head_dims = (layout.key.head_dim, layout.value.head_dim)
        self.recent = RecentRing(size, batch, layout.kv_heads, head_dims, dtype, device)
        self.sinks = SinkTokens(self.windows.sink_tokens, *(x[:, :, :0] for x in self.recent.rows))

    @property
    def layout(self) -> PageLayout:
        """The page layout."""
        return self.codec.layout

    @property
    def batch(self) -> int:
        """Sequences."""
        return self.block_table.shape[0]

    @property
    def device(self) -> torch.device:
        """Where everything is."""
        return self.pages.device

    @property
    def length(self) -> int:
        """Tokens of each sequence; waits for the device."""
        return int(self.filled)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Everything that is written in place."""
        return (self.pages, self.filled, self.exact_from, *self.recent.rows, *self.sinks.kept, self.sinks.starts)

    def append(self, keys: Tensor, values: Tensor, seq_starts: Tensor | None = None) -> None:
        """Pack and add tokens to every sequence.

        Args:
            keys: float ``[batch, kv_heads, tokens, head_dim]``; any number of tokens, 0 included.
            values: float ``[batch, kv_heads, tokens, value_head_dim]``.
            seq_starts: as in :meth:`WindowedSequences.append`.

        Raises:
            ValueError: wrong shape or dtype, or there is no room; nothing is added then. Off the CPU a lack of room
                stops the device.
        """
        check_appended(keys, values, self.batch, self.layout)
        tokens = keys.shape[2]
        if not tokens:
            return
        self._pack(keys, values)
        self._keep_exact(keys, values, seq_starts)
        self.exact_from.copy_(self.exact_from_after(tokens))
        self.filled.add_(tokens)

    def _pack(self, keys: Tensor, values: Tensor) -> None:
        layout, tokens = self.layout, keys.shape[2]
        slots = _next_slots(self.filled, self.block_table, tokens, layout.page_size, self.capacity)
        # Of more tokens than there is room for, the earlier ones would be written over by the later.
        kept = min(tokens, self.held * layout.page_size)
        slots = slots.view(self.batch, tokens)[:, tokens - kept :].flatten()
        keys, values = (token_major(x[:, :, tokens - kept :]) for x in (keys, values))
        self.provider.store(keys, values, self.pages, slots, self.codec)

    def _keep_exact(self, keys: Tensor, values: Tensor, seq_starts: Tensor | None) -> None:
        self.recent.write(keys, values, self.filled)
        if not self.sinks.count:
            return
        after = self.sinks.snapshot()
        after.place(seq_starts, self.filled)
        after.take(keys.detach().to(self.dtype), values.detach().to(self.dtype), self.filled)
        for held, new in zip((*self.sinks.kept, self.sinks.starts), (*after.kept, after.starts), strict=True):
            held.copy_(new)

    def exact_from_after(self, tokens: int) -> Tensor:
        """Where the recent window begins once ``tokens`` more are there, int64 scalar.

        As :meth:`Windows.unpacked` says: what was packed once is not read from the window again.
        """
        filled = self.filled + tokens
        border = torch.maximum(self.exact_from, filled - self.windows.recent_tokens)
        waits = (self.exact_from == 0) & (filled <= self.windows.start_after)
        return torch.where(waits, 0, border)

    def past(self) -> StaticPast:
        """What is held."""
        packed = PackedPast(self.pages, self.block_table, self.capacity, self.codec, self.provider)
        return StaticPast(packed, self.sinks, self.recent, self.filled, self.exact_from)

    def drop_last(self, tokens: int) -> None:
        """Forget the last ``tokens`` tokens of every sequence, or all; those that are packed stay so."""
        self.keep_first((self.filled - tokens).clamp(min=0))

    def keep_first(self, tokens: int | Tensor) -> None:
        """Forget all but the first ``tokens`` tokens of every sequence."""
        for position in (self.filled, self.exact_from):
            position.clamp_(max=tokens)

    def select(self, indices: Tensor) -> None:
        """Make sequence ``i`` a copy of the former sequence ``indices[i]``, int ``[batch]``.

        Raises:
            ValueError: another number of sequences.
        """
        if indices.shape[0] != self.batch:
            raise ValueError(f"static pages hold {self.batch} sequences; {indices.shape[0]} were chosen")
        indices = indices.to(self.device)
        pool = self.pages.view(self.held, self.batch, *self.pages.shape[1:])
        pool.copy_(pool.index_select(1, indices))
        for held in (*self.recent.rows, *self.sinks.kept, self.sinks.starts):
            held.copy_(held.index_select(0, indices))

    def memory(self) -> MemoryFigures:
        """True bytes: the packed tokens that can be read, and exact copies besides; waits for the device."""
        layout = self.layout
        tokens = min(self.length, self.held * layout.page_size)
        vectors = self.batch * layout.kv_heads * tokens
        exact = self.recent.nbytes + self.sinks.nbytes
        head_dims = layout.key.head_dim + layout.value.head_dim
        return MemoryFigures(
            stored=vectors * layout.token_bytes + (exact if tokens else 0),
            allocated=self.pages.nbytes + exact,
            uncompressed=vectors * head_dims * self.dtype.itemsize,
        )

    def reset(self) -> None:
        """Forget every token; the pages stay where they are."""
        for tensor in self.tensors:
            tensor.zero_()
