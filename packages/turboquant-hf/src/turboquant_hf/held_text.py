"""Which tokens a cache holds, as far as they were seen: another prompt is then an error and not a wrong answer."""

from __future__ import annotations

import torch
from torch import Tensor

_WAY_OUT = "start a new cache for it, or call reset() on this one"


class HeldText:
    """Token ids ``[batch, length]`` of a cache; None when tokens came in unseen.

    Attributes:
        added: tokens of the cache that are no text: the model puts them before its prompt by itself (CPM-Ant).
    """

    def __init__(self) -> None:
        self._ids: Tensor | None = None
        self.added = 0
        self._is_all = False

    @property
    def ids(self) -> Tensor | None:
        """What was seen."""
        return self._ids

    def note(self, ids: Tensor) -> None:
        """``ids`` is everything that the cache holds after the coming forward."""
        self._ids, self._is_all = ids, True

    def measure(self, length: int) -> None:
        """The cache holds ``length`` tokens, after the forward of what was noted."""
        if self._ids is not None and self._is_all:
            self.added = max(length - self._ids.shape[1], 0)

    def forget(self) -> None:
        """The cache is empty, or holds tokens that were not seen."""
        self._ids, self.added = None, 0

    def crop(self, length: int) -> None:
        """The cache was cropped to ``length`` tokens."""
        if self._ids is not None:
            self._ids, self._is_all = self._ids[:, : max(length - self.added, 0)], False

    def select(self, indices: Tensor) -> None:
        """Sequence ``i`` became a copy of sequence ``indices[i]``."""
        if self._ids is not None:
            self._ids = self._ids[indices.to(self._ids.device)]

    def repeat(self, repeats: int) -> None:
        """Every sequence was repeated."""
        if self._ids is not None:
            self._ids = self._ids.repeat_interleave(repeats, dim=0)

    def check(self, prompt: Tensor, length: int) -> None:
        """Raise unless ``prompt`` continues the ``length`` tokens of the cache.

        Args:
            prompt: token ids ``[batch, prompt length]``, what is cached included.
            length: tokens of the cache, added ones included.

        Raises:
            ValueError: the prompt is no longer than the cache, or begins with other tokens.
        """
        length = max(length - self.added, 0)
        if length and prompt.shape[1] <= length:
            raise ValueError(
                f"the prompt has {prompt.shape[1]} tokens and the cache already holds {length}, which it "
                f"cannot continue; {_WAY_OUT}"
            )
        if self._ids is None or self._ids.shape != (prompt.shape[0], length):
            # Tokens came in past this check (a direct call of the model): nothing to compare with.
            return
        if not torch.equal(self._ids.to(prompt.device), prompt[:, :length]):
            raise ValueError(f"the prompt does not begin with the {length} tokens that the cache holds; {_WAY_OUT}")

    def check_cut(self, prompt: Tensor, passed: Tensor) -> None:
        """Raise when the model is not passed what it needs of a prompt.

        Args:
            prompt: as for :meth:`check`.
            passed: token ids ``[batch, n]`` that the model gets: all of them, or those that the cache lacks.

        Raises:
            ValueError: Transformers cut ``prompt`` by the cache's length, added tokens included.
        """
        if self.added and passed.shape[1] != prompt.shape[1]:
            raise ValueError(
                f"{passed.shape[1]} of the {prompt.shape[1]} tokens of the prompt reach the model: it put {self.added} "
                f"tokens of its own into the cache, and Transformers counts them as text; {_WAY_OUT}"
            )
