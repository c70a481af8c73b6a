"""Packed layers of fixed room of models that keep more in a layer than keys and values."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from turboquant_core import MemoryFigures

from .compat import LinearAttentionCacheLayerMixin
from .memory import dense_memory, tensors_of
from .special_layer import StateBeside
from .static_layer import TurboQuantStaticLayer
from .static_sliding_layer import TurboQuantStaticSlidingLayer


class FixedStateBeside(StateBeside):
    """As :class:`StateBeside`, of a state that stays where it is, as the pages do: compiled graphs know its address."""

    def _reorder_state(self, beam_idx: torch.LongTensor) -> None:
        # What the stock layer does, which puts new tensors in the place of these.
        for tensor in tensors_of(self.state):
            tensor.copy_(tensor.index_select(0, beam_idx.to(tensor.device)))
        positions = getattr(self.state, "indexer_position_ids", None)
        if positions is not None:
            self.state.indexer_position_ids = positions.index_select(1, beam_idx.to(positions.device))


class TurboQuantStaticIndexedLayer(FixedStateBeside, TurboQuantStaticLayer):
    """A full-attention layer of fixed room with the keys of a sparse attention's indexer, which stay as they are."""

    _has_index = False

    def update_indexer(self, indexer_key_states: Tensor) -> Tensor:
        """Add keys ``[batch, tokens, index_head_dim]`` of the indexer; return those that the model's mask is about.

        Returns:
            ``[batch, tokens, index_head_dim]`` of the first call, ``[batch, max_cache_len, index_head_dim]`` of later
            ones; what is beyond the held tokens must be masked.
        """
        indexed: Tensor = self.state.update_indexer(indexer_key_states)
        # Transformers gives all of the room to the prompt too, but the mask here is no wider than the prompt.
        shown = indexed if self._has_index else indexed[:, : indexer_key_states.shape[1]]
        self._has_index = True
        return shown

    def reset(self) -> None:
        """Forget every token; pages stay, so that compiled graphs and the batch size do."""
        super().reset()
        self._has_index = False

    def _state_memory(self) -> MemoryFigures:
        """Of the indexer's keys, those of held tokens are stored, and the room is allocated."""
        room = dense_memory(self.state).allocated
        held = 0 if self.store is None else room * self.store.length // self.max_cache_len
        return MemoryFigures(held, room, held)


@LinearAttentionCacheLayerMixin.register
class FixedHybrid(FixedStateBeside):
    """Of a convolution's and a recurrent state, which keep nothing of what they were before."""

    is_croppable: Any = False

    def activate_past_recording(self) -> NoReturn:
        """Refused: see the error."""
        # A state that grows is not compiled, and Transformers leaves masks out then: the room would be attended to.
        self._refuse_past("record its past")

    def crop(self, tokens_to_remove: int) -> NoReturn:
        """Refused: see the error."""
        self._refuse_past(f"go back {abs(tokens_to_remove)} tokens")

    def _refuse_past(self, what: str) -> NoReturn:
        raise ValueError(
            f"layer {self.layer_idx} of a static cache keeps a linear-attention state, which cannot {what}: use "
            "TurboQuantCache (without max_cache_len)"
        )


class TurboQuantStaticHybridLayer(FixedHybrid, TurboQuantStaticLayer):
    """A full-attention layer of fixed room with a convolution's and a recurrent state, which stay as they are."""


class TurboQuantStaticHybridSlidingLayer(FixedHybrid, TurboQuantStaticSlidingLayer):
    """A sliding-window layer of fixed room with a convolution's and a recurrent state, which stay as they are."""
