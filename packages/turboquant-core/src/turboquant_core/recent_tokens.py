"""The last tokens of each sequence, in full precision: a window that moves on by one token copies that token alone."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .provider import Gathered

ROOM = 16
"""Steps for which there is room behind a window before it is copied."""


class _Track(NamedTuple):
    """Views of one buffer, made once for all the steps that it has room for: views cost the host time as copies do.

    Attributes:
        first: token that leaves in step ``i``, ``[batch, kv_heads, d]``.
        place: where the token of step ``i`` goes, ``[batch, kv_heads, 1, d]``.
        window: tokens before step ``i``, ``[batch, kv_heads, tokens, d]``.
    """

    first: tuple[Tensor, ...]
    place: tuple[Tensor, ...]
    window: tuple[Tensor, ...]

    @classmethod
    def behind(cls, x: Tensor) -> _Track:
        """A buffer that begins with a copy of ``x``."""
        tokens = x.shape[2]
        buffer = torch.cat((x, x.new_empty((*x.shape[:2], ROOM, x.shape[3]))), 2)
        windows = buffer.unfold(2, tokens, 1).transpose(3, 4)
        return cls(buffer[:, :, :ROOM].unbind(2), buffer[:, :, tokens:].split(1, 2), windows.unbind(2))


class RecentTokens:
    """Keys and values of a window. What was handed out stays as it is, whatever comes after.

    Args:
        tokens: keys and values ``[batch, kv_heads, tokens, d]``, not written to by anyone.

    Attributes:
        tokens: keys and values that are held now.
    """

    def __init__(self, tokens: Gathered) -> None:
        self.tokens = tokens
        self._tracks: tuple[_Track, _Track] | None = None
        self._step = 0

    @property
    def count(self) -> int:
        """Tokens of each sequence."""
        return self.tokens.keys.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of the tokens."""
        return sum(x.nbytes for x in self.tokens)

    @property
    def allocated(self) -> int:
        """Bytes of the tokens and of the room behind them."""
        return self.nbytes if self._tracks is None else self.nbytes // self.count * (self.count + ROOM)

    def first(self) -> tuple[Tensor, Tensor]:
        """Key and value of the first token, ``[batch, kv_heads, d]``; there is one."""
        if self._tracks is None or self._step == ROOM:
            keys, values = self.tokens
            self._tracks, self._step = (_Track.behind(keys), _Track.behind(values)), 0
        key, value = self._tracks
        return key.first[self._step], value.first[self._step]

    def advance(self, keys: Tensor, values: Tensor) -> None:
        """After :meth:`first`, forget that token and hold ``[batch, kv_heads, 1, d]`` more, which need no gradient."""
        assert self._tracks is not None
        key, value = self._tracks
        key.place[self._step].copy_(keys)
        value.place[self._step].copy_(values)
        self._step += 1
        self.tokens = Gathered(key.window[self._step], value.window[self._step])

    def __getstate__(self) -> Gathered:
        return self.tokens

    def __setstate__(self, tokens: Gathered) -> None:
        self.tokens, self._tracks, self._step = tokens, None, 0
