"""A sliding-window layer whose window is packed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from .compat import DynamicSlidingWindowLayer
from .handle import StepPast
from .layer import TurboQuantLayer
from .options import CacheOptions
from .padding import Padding

_SLACK = 8
"""Pages that have left the window are dropped when they are one part in this of it: dropping copies the others."""


class TurboQuantSlidingLayer(TurboQuantLayer, DynamicSlidingWindowLayer):
    """As :class:`TurboQuantLayer`, of at most ``sliding_window - 1`` past tokens and a few pages.

    Sinks are not kept: they leave the window.

    Args:
        layer_idx: position in the model.
        n_layers: layers of the model.
        options: of the cache.
        padding: of the cache's sequences.
        sliding_window: tokens that a query sees, itself included.
    """

    def __init__(
        self, layer_idx: int, n_layers: int, options: CacheOptions, padding: Padding, sliding_window: int
    ) -> None:
        super().__init__(layer_idx, n_layers, options, padding)
        self.windows = replace(options.windows, sink_tokens=0)
        self.sliding_window = self.window = sliding_window
        self.cumulative_length = 0
        self.record_past = False
        self._shown = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As a packed layer; handles show the window of the first new token and all after it."""
        new = key_states.shape[2]
        self._shown = min(self.cumulative_length, self.sliding_window - 1) + new
        updated = super().update(key_states, value_states, *args, **kwargs)
        self.cumulative_length += new
        self._shown = min(self.cumulative_length, self.sliding_window - 1)
        if not self.record_past:
            self._drop()
        return updated

    def _exact(self) -> tuple[Tensor, Tensor]:
        keys, values = super()._exact()
        return keys[:, :, -self._shown :], values[:, :, -self._shown :]

    def step_past(self) -> StepPast:
        """What attention may read now."""
        return StepPast(self.past(), self.dtype, self.counters, length=self._shown, window=self.sliding_window)

    def _drop(self) -> None:
        store = self.packed_sequences
        size = store.layout.page_size
        pages = min(store.length - self.sliding_window + 1, store.packed.length) // size
        if pages >= max(self.sliding_window // (size * _SLACK), 1):
            store.drop(pages)

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.cumulative_length

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` tokens; a positive number keeps that many (older Transformers).

        Raises:
            RuntimeError: the window would reach back to tokens that were dropped.
        """
        length = self.cumulative_length
        kept = max(length + tokens_to_remove, 0) if tokens_to_remove <= 0 else min(tokens_to_remove, length)
        if self.store is not None:
            held = self.store.length - (length - kept)
            if held < min(kept, self.sliding_window - 1):
                raise RuntimeError(
                    f"layer {self.layer_idx} cannot go back {length - kept} tokens: what the window of "
                    f"{self.sliding_window} tokens would show then is no longer held; call activate_past_recording() "
                    "on the cache first"
                )
            self.store.crop(held)
            self.cumulative_length = kept
            self._shown = min(kept, self.sliding_window - 1)
            self._drop()

    def restore(self, seen: int) -> None:
        """The pages were filled from a file, after ``seen`` tokens.

        Raises:
            ValueError: the pages hold fewer tokens than the window shows.
        """
        if not min(seen, self.sliding_window - 1) <= self.packed_sequences.length <= seen:
            raise ValueError(f"{self.packed_sequences.length} tokens are held of {seen}")
        self.cumulative_length = seen
        self._shown = min(seen, self.sliding_window - 1)

    def reset(self) -> None:
        """Forget every token and free the pages."""
        super().reset()
        self.cumulative_length = self._shown = 0
