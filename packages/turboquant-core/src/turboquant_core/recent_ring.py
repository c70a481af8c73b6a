"""The most recent tokens in full precision, in tensors that never change their place."""

from __future__ import annotations

import torch
from torch import Tensor

from .provider import Gathered


class RecentRing:
    """Room for ``size`` tokens; the one at position ``p`` has row ``p % size``.

    Args:
        size: tokens, 0 for none.
        batch: sequences.
        kv_heads: KV heads.
        head_dims: coordinates of a key and of a value.
        dtype: of both.
        device: where they are.

    Attributes:
        rows: keys and values ``[batch, kv_heads, size, d]``.
    """

    def __init__(
        self,
        size: int,
        batch: int,
        kv_heads: int,
        head_dims: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.size = size
        self.rows = Gathered(
            *(torch.zeros(batch, kv_heads, size, head_dim, dtype=dtype, device=device) for head_dim in head_dims)
        )

    @property
    def nbytes(self) -> int:
        """True bytes."""
        return sum(x.nbytes for x in self.rows)

    def write(self, keys: Tensor, values: Tensor, start: Tensor) -> None:
        """Take the tokens at positions from ``start`` (int64 scalar) on; the last ``size`` of them stay."""
        tokens = keys.shape[2]
        kept = min(tokens, self.size)
        if not kept:
            return
        row = (start + torch.arange(tokens - kept, tokens, device=start.device)) % self.size
        for held, new in zip(self.rows, (keys, values), strict=True):
            held.index_copy_(2, row, new[:, :, tokens - kept :].detach().to(held.dtype))

    def positions(self, end: Tensor) -> Tensor:
        """Position int64 ``[size]`` of each row when ``end`` tokens were written; negative where none was."""
        last = end - 1
        return last - (last - torch.arange(self.size, device=end.device)) % self.size

    def overlay(self, decoded: Gathered, start: int, border: Tensor, end: Tensor) -> Gathered:
        """``decoded`` keys and values from position ``start`` on, with those from ``border`` on as they are here."""
        if not self.size:
            return decoded
        position = torch.arange(start, start + decoded.keys.shape[2], device=end.device)
        is_recent = ((position >= border) & (position < end)).view(1, 1, -1, 1)
        return Gathered(
            *(
                torch.where(is_recent, held.index_select(2, position % self.size).to(x.dtype), x)
                for held, x in zip(self.rows, decoded, strict=True)
            )
        )
