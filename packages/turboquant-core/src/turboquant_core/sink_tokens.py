"""The first visible tokens of each sequence, in full precision."""

from __future__ import annotations

import torch
from torch import Tensor

from .provider import Gathered


class SinkTokens:
    """Copies of the tokens at positions ``starts[b] .. starts[b] + count - 1`` of each sequence ``b``.

    The tokens are packed as well, so that positions do not shift; attention takes these copies instead.

    Args:
        count: tokens of each sequence.
        keys: float ``[batch, kv_heads, 0, head_dim]``, for shape, dtype and device.
        values: float ``[batch, kv_heads, 0, value_head_dim]``.

    Attributes:
        starts: int64 ``[batch]``, first visible position as far as it is known.
        kept: keys and values ``[batch, kv_heads, count, d]``; tokens that have not come are zero.
        settled_at: how many tokens it takes for all sinks to be among them; None as long as the host does not know.
        stop: int32 ``[batch]``, position after the last sink; None as long as ``settled_at`` is.
    """

    settled_at: int | None = None
    stop: Tensor | None = None

    def __init__(self, count: int, keys: Tensor, values: Tensor) -> None:
        self.count = count
        self.starts = torch.zeros(keys.shape[0], dtype=torch.int64, device=keys.device)
        self.kept = Gathered(*(x.new_zeros((*x.shape[:2], count, x.shape[3])) for x in (keys, values)))

    @property
    def nbytes(self) -> int:
        """True bytes."""
        return sum(x.nbytes for x in self.kept) if self.count else 0

    def place(self, starts: Tensor | None, length: int | Tensor) -> None:
        """Learn first visible positions; only of sequences of which nothing among the ``length`` tokens is visible."""
        if not isinstance(length, int) or length == 0:
            self.starts = self.starts * (length != 0)
        if starts is not None:
            self.starts = torch.where(self.starts >= length, starts.to(self.starts), self.starts)

    def take(self, keys: Tensor, values: Tensor, length: int | Tensor) -> None:
        """Copy those of the coming tokens, at positions from ``length`` on, that are sinks."""
        if not self.count or not keys.shape[2]:
            return
        source = self.positions() - length
        coming = ((source >= 0) & (source < keys.shape[2]))[:, None, :, None]
        index = source.clamp(0, keys.shape[2] - 1)
        self.kept = Gathered(
            *(torch.where(coming, _pick(new, index), old) for new, old in zip((keys, values), self.kept, strict=True))
        )

    def settle(self, length: int) -> None:
        """Find out whether all sinks are among the first ``length`` tokens; the host waits for the device."""
        if self.count:
            stop = self.starts + self.count
            last = int(stop.max())
            if last <= length:
                self.settled_at, self.stop = last, stop.int()

    def unsettle(self, length: int) -> None:
        """Only the first ``length`` tokens are left."""
        if not self.are_settled(length):
            self.settled_at = self.stop = None

    def are_settled(self, length: int) -> bool:
        """Whether all sinks are known to be among the first ``length`` tokens."""
        return self.settled_at is not None and self.settled_at <= length

    def positions(self) -> Tensor:
        """Int64 ``[batch, count]``."""
        return self.starts.unsqueeze(1) + torch.arange(self.count, device=self.starts.device)

    def overlay(self, decoded: Gathered, start: int) -> Gathered:
        """``decoded`` keys and values from position ``start`` on, with the sinks in their places."""
        tokens = decoded.keys.shape[2]
        if not self.count or not tokens:
            return decoded
        index = torch.arange(start, start + tokens, device=self.starts.device) - self.starts.unsqueeze(1)
        is_sink = ((index >= 0) & (index < self.count))[:, None, :, None]
        index = index.clamp(0, self.count - 1)
        return Gathered(
            *(torch.where(is_sink, _pick(x, index).to(y), y) for x, y in zip(self.kept, decoded, strict=True))
        )

    def select(self, indices: Tensor) -> SinkTokens:
        """Sequence ``i`` is a copy of sequence ``indices[i]``."""
        return self._with(
            self.starts[indices],
            Gathered(*(x[indices] for x in self.kept)),
            None if self.stop is None else self.stop[indices],
        )

    def to(self, device: torch.device | str) -> SinkTokens:
        """The same tokens on ``device``."""
        stop = None if self.stop is None else self.stop.to(device)
        return self._with(self.starts.to(device), Gathered(*(x.to(device) for x in self.kept)), stop)

    def holding(self, starts: Tensor, kept: Gathered) -> SinkTokens:
        """Other tokens in the place, dtype and device of these."""
        return self._with(starts.to(self.starts), Gathered(*(x.to(y) for x, y in zip(kept, self.kept, strict=True))))

    def snapshot(self) -> SinkTokens:
        """What is held now: no operation here writes into tensors, so they may be shared."""
        return self._with(self.starts, self.kept, self.stop)

    def _with(self, starts: Tensor, kept: Gathered, stop: Tensor | None = None) -> SinkTokens:
        other = SinkTokens.__new__(SinkTokens)
        other.count, other.starts, other.kept = self.count, starts, kept
        if stop is not None:
            other.settled_at, other.stop = self.settled_at, stop
        return other


def _pick(x: Tensor, index: Tensor) -> Tensor:
    """Tokens ``index`` ``[batch, n]`` of ``x`` ``[batch, heads, tokens, d]``."""
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
