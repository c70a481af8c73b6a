"""Packed layers of models that keep more in a layer than keys and values: Mamba states, keys of an indexer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from turboquant_core import MemoryFigures

from .compat import LinearAttentionCacheLayerMixin, LinearAttentionLayer
from .layer import TurboQuantLayer
from .memory import dense_memory
from .packed_layer import LayerShape, PackedLayer
from .sliding_layer import TurboQuantSlidingLayer


def _of_state(name: str) -> property:
    """An attribute of the state that a cache or a model reads where the packed layer has its own, or assigns."""
    return property(lambda self: getattr(self.state, name), lambda self, value: setattr(self.state, name, value))


class StateBeside(PackedLayer[Any]):
    """What a layer has besides its packed keys and values: a stock layer that is never given keys and values.

    Its methods and attributes are found on this one, and what is done to the cache is done to both. What one of them
    always refuses changes nothing: a recurrent state is not cropped, pages of fixed room are not offloaded.

    Args:
        state: an empty layer of Transformers.
        packed: arguments of the packed layer that this is mixed into.
    """

    is_croppable = _of_state("is_croppable")
    supports_early_init = _of_state("supports_early_init")
    record_past = _of_state("record_past")
    indexer_position_ids = _of_state("indexer_position_ids")

    def __init__(self, state: Any, *packed: Any) -> None:
        self.state = state
        super().__init__(*packed)

    def __getattr__(self, name: str) -> Any:
        # Nothing is there yet while a copy is made.
        if "state" not in vars(self):
            raise AttributeError(name)
        return getattr(self.state, name)

    def create_store(self, shape: LayerShape, device: torch.device, center: Tensor | None) -> None:
        """Create empty pages; see :meth:`PackedLayer.create_store`."""
        super().create_store(shape, device, center)
        if not hasattr(self.state, "device"):
            self.state.device = device

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` tokens.

        Raises:
            RuntimeError: of the state, when it does not keep what it was before.
        """
        self.state.crop(tokens_to_remove)
        super().crop(tokens_to_remove)  # type: ignore[misc]

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Give sequence ``i`` the past of sequence ``beam_idx[i]``."""
        self._reorder_state(beam_idx)
        super().reorder_cache(beam_idx)  # type: ignore[misc]

    def _reorder_state(self, beam_idx: torch.LongTensor) -> None:
        self.state.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence ``repeats`` times; a recurrent state cannot."""
        self.state.batch_repeat_interleave(repeats)
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences ``indices`` (integers or a boolean mask); a recurrent state cannot."""
        self.state.batch_select_indices(indices)
        super().batch_select_indices(indices)  # type: ignore[misc]

    def reset(self) -> None:
        """Forget every token."""
        self.state.reset()
        super().reset()  # type: ignore[misc]

    def offload(self) -> None:
        """Move everything to the CPU until the next update.

        Raises:
            ValueError: the pages have a fixed place.
        """
        super().offload()  # type: ignore[misc]
        self.state.offload()

    def prefetch(self) -> None:
        """Move everything back to the device of the layer."""
        self.state.prefetch()
        super().prefetch()  # type: ignore[misc]

    def memory(self) -> MemoryFigures:
        """True bytes of the layer, the state included."""
        return super().memory() + self._state_memory()

    def _state_memory(self) -> MemoryFigures:
        return dense_memory(self.state)


class TurboQuantIndexedLayer(StateBeside, TurboQuantLayer):
    """A full-attention layer with the keys of a sparse attention's indexer, which stay as they are."""


@LinearAttentionCacheLayerMixin.register
class TurboQuantHybridLayer(StateBeside, TurboQuantLayer):
    """A full-attention layer with a convolution's and a recurrent state, which stay as they are."""


@LinearAttentionCacheLayerMixin.register
class TurboQuantHybridSlidingLayer(StateBeside, TurboQuantSlidingLayer):
    """A sliding-window layer with a convolution's and a recurrent state, which stay as they are."""


def linear_state(hybrid: Any) -> LinearAttentionLayer:
    """The part of a layer of Transformers that is not keys and values, empty."""
    # Several states in one layer came after Transformers 5.5.
    number = getattr(hybrid, "number_of_states", None)
    return LinearAttentionLayer() if number is None else LinearAttentionLayer(number)
