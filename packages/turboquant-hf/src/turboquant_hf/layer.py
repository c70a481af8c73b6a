"""One layer of a growing cache: raw keys and values at the first call, packed handles afterwards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from turboquant_core import CacheCodec, KernelProvider, PackedSequences, WindowedPast, WindowedSequences

from .compat import DynamicLayer, uncompiled
from .options import CacheOptions
from .packed_layer import LayerShape, PackedLayer
from .padding import Padding


@dataclass(frozen=True, slots=True)
class Held:
    """What a layer holds.

    Attributes:
        packed: tokens in pages.
        tensors: by name; ``center`` only where keys are centred.
    """

    packed: int
    tensors: dict[str, Tensor]


class TurboQuantLayer(PackedLayer[WindowedSequences], DynamicLayer):
    """A full-attention layer whose past is packed; see :class:`PackedLayer`."""

    def __init__(self, layer_idx: int, n_layers: int, options: CacheOptions, padding: Padding) -> None:
        PackedLayer.__init__(self, layer_idx, n_layers, options, padding)
        DynamicLayer.__init__(self)

    def _make_store(self, batch: int, codec: CacheCodec, provider: KernelProvider) -> WindowedSequences:
        return WindowedSequences(PackedSequences(batch, codec, provider, self.dtype), self.windows)

    @uncompiled("pages that grow are no part of a graph: use TurboQuantStaticCache or patch_model(max_cache_len=...)")
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add keys and values; return what attention should use.

        The first call returns its arguments, so that a prompt is attended to in full precision by the model's own
        kernel; later calls return :class:`PackedTensor` handles of the whole past, or the past itself while nothing of
        it is packed.

        Raises:
            ValueError: another number of sequences than the cache holds.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._check_batch(key_states)
        self._move(key_states.device)
        self.prefetch()
        store = self.packed_sequences
        if self.probe is not None:
            self.probe.see(key_states, value_states)
        first = store.length == 0
        # Raw values are stored as they are, so that one dtype must do for the whole past.
        keys, values = key_states, value_states if value_states.dtype == self.dtype else value_states.to(self.dtype)
        if keys.requires_grad or values.requires_grad:
            # No gradient flows through codes, and exact tokens would keep the graph of every step alive.
            keys, values = keys.detach(), values.detach()
        store.append(keys, values, self.padding.starts(store.batch))
        if first:
            return key_states, value_states
        if store.packed.length:
            return self._handles(key_states.dtype)
        exact_keys, exact_values = self._exact()
        return exact_keys.to(key_states.dtype), exact_values.to(value_states.dtype)

    def _exact(self) -> tuple[Tensor, Tensor]:
        """Keys and values that attention should use while all of them are in the recent window."""
        return self.packed_sequences.recent

    def adopt(self, shape: LayerShape, device: torch.device, held: Held) -> None:
        """Hold what another layer held.

        Args:
            shape: of it.
            device: to hold it on.
            held: what :meth:`held` gave.

        Raises:
            KeyError: a tensor is missing.
            ValueError: a tensor does not fit.
        """
        self.create_store(shape, device, held.tensors.get("center"))
        store = self.packed_sequences
        store.packed.adopt(held.tensors["pages"], held.packed)
        names = ("recent_keys", "recent_values", "sink_keys", "sink_values", "sink_starts")
        store.adopt_exact(*(held.tensors[name] for name in names))

    def held(self) -> Held:
        """Everything that is held, copied."""
        store = self.packed_sequences
        tensors = {
            "pages": store.packed.export(),
            "recent_keys": store.recent.keys,
            "recent_values": store.recent.values,
            "sink_keys": store.sinks.kept.keys,
            "sink_values": store.sinks.kept.values,
            "sink_starts": store.sinks.starts,
        }
        center = store.codec.key.center
        return Held(store.packed.length, tensors if center is None else {**tensors, "center": center})

    @property
    def shape(self) -> LayerShape:
        """Of what is held."""
        store = self.packed_sequences
        layout = store.layout
        return LayerShape(store.batch, layout.kv_heads, layout.key.head_dim, layout.value.head_dim, self.dtype)

    def _move(self, device: torch.device) -> None:
        """Begin anew on the device of the model's layer: a loaded cache may be elsewhere, codecs and kernels too."""
        if device != self.device:
            self.adopt(self.shape, device, self.held())

    def past(self) -> WindowedPast:
        """Everything that is held."""
        self.prefetch()
        past = self.packed_sequences.past()
        return past if self.probe is None else self.probe.watch(past)

    def get_seq_length(self) -> int:
        """Tokens held."""
        return 0 if self.store is None else self.store.length

    def reset(self) -> None:
        """Forget every token and free the pages; the next update may have another batch size."""
        self.store = None
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` tokens; a positive number keeps that many (older Transformers)."""
        if self.store is None or tokens_to_remove == 0:
            return
        kept = self.store.length + tokens_to_remove if tokens_to_remove < 0 else tokens_to_remove
        self.store.crop(max(min(kept, self.store.length), 0))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Give sequence ``i`` the past of sequence ``beam_idx[i]``."""
        if self.store is not None:
            self.store.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence ``repeats`` times."""
        if self.store is not None:
            batch = torch.arange(self.store.batch, device=self.store.device)
            self.store.select(batch.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences ``indices`` (integers or a boolean mask)."""
        if self.store is not None:
            self.store.select(indices.nonzero().squeeze(-1) if indices.dtype == torch.bool else indices)

    def offload(self) -> None:
        """Move the pages to the CPU until the next update; attention keeps what it was handed."""
        if self.store is not None:
            self.store.move("cpu")

    def prefetch(self) -> None:
        """Move the pages back to the device of the layer."""
        if self.store is not None and self.store.device != self.device:
            self.store.move(self.device)
