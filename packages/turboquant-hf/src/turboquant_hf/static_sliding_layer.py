"""A sliding-window layer of fixed room whose window is packed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .compat import StaticSlidingWindowLayer
from .fused import LARGEST_FUSED_QUERY, LONG_QUERY
from .handle import StepPast
from .options import CacheOptions
from .padding import Padding
from .round_trip import round_trip
from .static_layer import TurboQuantStaticLayer


class TurboQuantStaticSlidingLayer(TurboQuantStaticLayer, StaticSlidingWindowLayer):
    """As :class:`TurboQuantStaticLayer`, of pages that are written over once they have left the window.

    Sinks are not kept: they leave the window. A chunk of more queries than the pages have room for beside the window is
    attended to decoded; its length is read by the host, so that it cannot be compiled.

    Args:
        layer_idx: position in the model.
        n_layers: layers of the model.
        options: of the cache.
        padding: of the cache's sequences.
        max_cache_len: tokens that a sequence may have.
        sliding_window: tokens that a query sees, itself included.
    """

    def __init__(
        self,
        layer_idx: int,
        n_layers: int,
        options: CacheOptions,
        padding: Padding,
        max_cache_len: int,
        sliding_window: int,
    ) -> None:
        super().__init__(layer_idx, n_layers, options, padding, max_cache_len)
        self.windows = replace(options.windows, sink_tokens=0)
        self.sliding_window = self.window = sliding_window
        size = options.page_size
        self.room = -(-(sliding_window - 1 + LARGEST_FUSED_QUERY) // size) * size
        self._oldest = 0

    def _is_long(self, tokens: int) -> bool:
        assert self.room is not None
        return self.has_past and self.room < self.max_cache_len and tokens > self.room - self.sliding_window + 1

    def step_past(self) -> StepPast:
        """What attention may read now."""
        return StepPast(self.past(), self.dtype, self.counters, window=self.sliding_window)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """As a static layer; a long chunk over a past gives dense keys and values, as packing makes them."""
        if not self._is_long(key_states.shape[2]):
            return super().update(key_states, value_states, *args, **kwargs)
        self._check_batch(key_states)
        if self.probe is not None:
            self.probe.see(key_states, value_states)
        self.counters.count("decoded", LONG_QUERY)
        keys, values = self._with_window(key_states, value_states)
        self._append(key_states, value_states)
        return keys, values

    def _with_window(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """What the window shows of the past, and new tokens, as they will be held; before they are."""
        store = self.packed_sequences
        past, end, new = store.past(), store.length, key_states.shape[2]
        start = end - min(end, self.sliding_window - 1)
        exact_from = store.exact_from_after(new)
        before = past.recent.overlay(past.packed.read(start, end, self.dtype), start, exact_from, past.filled)
        coming = round_trip(store.codec, store.provider, key_states, value_states)
        is_exact = torch.zeros(new, 1, dtype=torch.bool, device=store.device)
        if past.recent.size:
            is_exact = (end + torch.arange(new, device=store.device) >= exact_from)[:, None]
        given = (torch.where(is_exact, x, y) for x, y in zip((key_states, value_states), coming, strict=True))
        keys, values = (torch.cat(pair, 2) for pair in zip(before, given, strict=True))
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As a static layer, but the window and the chunk where that is long.

        Raises:
            ValueError: such a chunk while a graph is traced.
        """
        if not self._is_long(query_length):
            return super().get_mask_sizes(query_length)
        if torch.compiler.is_compiling():
            raise ValueError(
                f"a compiled step of {query_length} tokens over a packed sliding window: at most "
                f"{self.room - self.sliding_window + 1} can be compiled"  # type: ignore[operator]
            )
        length = self.packed_sequences.length
        shown = min(length, self.sliding_window - 1)
        return shown + query_length, length - shown

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Whether any number of tokens can be removed."""
        assert self.room is not None
        return self.max_cache_len <= self.room

    def crop(self, tokens_to_remove: int) -> None:
        """As a static layer; waits for the device.

        Raises:
            RuntimeError: the window would reach back to tokens that were written over.
        """
        if self.store is None or tokens_to_remove == 0:
            return
        assert self.room is not None
        length = self.store.length
        kept = max(length + tokens_to_remove, 0) if tokens_to_remove < 0 else min(tokens_to_remove, length)
        self._oldest = max(self._oldest, length - self.room)
        if kept - min(kept, self.sliding_window - 1) < self._oldest:
            raise RuntimeError(
                f"layer {self.layer_idx} cannot go back {length - kept} tokens: what the window of "
                f"{self.sliding_window} tokens would show then was written over"
            )
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        """Forget every token; pages stay."""
        super().reset()
        self._oldest = 0
