"""Which tokens a cache holds, as far as they were seen: another prompt is then an error and not a wrong answer."""

from __future__ import annotations

import torch
from torch import Tensor

_WAY_OUT = "start a new cache for it, or call reset() on this one"


class HeldText:
    """Token ids ``[batch, length]`` of a cache; None when tokens came in unseen."""

    def __init__(self) -> None:
        self._ids: Tensor | None = None

    @property
    def ids(self) -> Tensor | None:
        """What was seen."""
        return self._ids

    def note(self, ids: Tensor) -> None:
        """``ids`` is everything that the cache holds after the coming forward."""
        self._ids = ids

    def forget(self) -> None:
        """The cache is empty, or holds tokens that were not seen."""
        self._ids = None

    def crop(self, length: int) -> None:
        """The cache was cropped to ``length`` tokens."""
        if self._ids is not None:
            self._ids = self._ids[:, :length]

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
            length: tokens of the cache.

        Raises:
            ValueError: the prompt is no longer than the cache, or begins with other tokens.
        """
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
