"""One layer of the cache: raw keys and values at the first call, packed handles afterwards."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from turboquant_core import (
    CacheCodec,
    KernelRequest,
    LayoutError,
    MemoryFigures,
    PackedSequences,
    PageLayout,
    RawLayout,
    VectorLayout,
    WindowedPast,
    WindowedSequences,
    select_provider,
)

from .compat import DynamicLayer
from .counters import LayerCounters
from .handle import PackedTensor, StepPast
from .options import CacheOptions
from .padding import Padding


class Probe(Protocol):
    """What measures a layer during verification."""

    def see(self, keys: Tensor, values: Tensor) -> None:
        """Keys and values of an update."""

    def watch(self, past: WindowedPast) -> WindowedPast:
        """A past that measures as it attends."""


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What the first keys and values fix for the life of a layer."""

    batch: int
    kv_heads: int
    head_dim: int
    value_head_dim: int
    dtype: torch.dtype

    @classmethod
    def of(cls, key: Tensor, value: Tensor) -> LayerShape:
        """Shape of keys ``[batch, kv_heads, tokens, head_dim]`` and their values."""
        return cls(key.shape[0], key.shape[1], key.shape[-1], value.shape[-1], key.dtype)


class TurboQuantLayer(DynamicLayer):
    """A full-attention layer whose past is packed.

    Args:
        layer_idx: position in the model.
        n_layers: layers of the model.
        options: of the cache.
        padding: of the cache's sequences.

    Raises:
        ValueError: ``bits`` says nothing about this layer.
    """

    window: int | None = None
    """Tokens that a query sees, itself included; None for all."""

    def __init__(self, layer_idx: int, n_layers: int, options: CacheOptions, padding: Padding) -> None:
        self.store: WindowedSequences | None = None
        self.layer_idx = layer_idx
        self.options = options
        self.bits = options.layer_bits(layer_idx)
        self.packs_values = options.packs_values(layer_idx, n_layers)
        self.windows = options.windows
        self.padding = padding
        self.counters = LayerCounters()
        self.probe: Probe | None = None
        DynamicLayer.__init__(self)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Create the pages from the first keys ``[batch, kv_heads, tokens, head_dim]`` and values.

        Raises:
            LayoutError: the head_dim cannot be packed; names the layer.
            ProviderError: no kernel provider fits.
        """
        center = self.options.center(self.layer_idx, key_states)
        self.create_store(LayerShape.of(key_states, value_states), key_states.device, center)

    def create_store(self, shape: LayerShape, device: torch.device, center: Tensor | None) -> None:
        """Create empty pages; see :meth:`lazy_initialization`."""
        self.dtype, self.device = shape.dtype, device
        try:
            layout = self._layout(shape)
            codec = CacheCodec.create(layout, seed=self.options.seed, center=center, device=device)
        except (LayoutError, ValueError) as error:
            raise LayoutError(f"layer {self.layer_idx} cannot be packed: {error}") from error
        provider = select_provider(KernelRequest(layout, device, self.dtype), self.options.provider)
        self.store = WindowedSequences(PackedSequences(shape.batch, codec, provider, self.dtype), self.windows)
        self.is_initialized = True

    def _layout(self, shape: LayerShape) -> PageLayout:
        key_bits, value_bits = self.bits
        packed = VectorLayout(shape.value_head_dim, value_bits, "cubic") if self.packs_values else None
        return PageLayout(
            key=VectorLayout(shape.head_dim, key_bits, "int8"),
            value=packed or RawLayout(shape.value_head_dim, self.dtype.itemsize),
            page_size=self.options.page_size,
            kv_heads=shape.kv_heads,
        )

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
        store = self.packed_sequences
        if key_states.shape[0] != store.batch:
            raise ValueError(
                f"layer {self.layer_idx} holds {store.batch} sequences and got {key_states.shape[0]}: this cache "
                "belongs to another prompt; start a new cache, or call reset() on this one"
            )
        self.prefetch()
        if self.probe is not None:
            self.probe.see(key_states, value_states)
        first = store.length == 0
        # Raw values are stored as they are, so that one dtype must do for the whole past.
        store.append(key_states, value_states.to(self.dtype), self.padding.starts(store.batch))
        if first:
            return key_states, value_states
        return self._exact() or self._handles()

    def _exact(self) -> tuple[Tensor, Tensor] | None:
        """Keys and values, as long as all of them are in the recent window."""
        store = self.packed_sequences
        return None if store.packed.length else store.recent

    @property
    def packed_sequences(self) -> WindowedSequences:
        """The pages.

        Raises:
            RuntimeError: before the first update.
        """
        if self.store is None:
            raise RuntimeError(f"layer {self.layer_idx} holds no tokens yet")
        return self.store

    def step_past(self) -> StepPast:
        """What attention may read now."""
        return StepPast(self.past(), self.dtype, self.counters, padding_is_known=self.padding.is_known)

    def past(self) -> WindowedPast:
        """Everything that is held."""
        self.prefetch()
        past = self.packed_sequences.past()
        return past if self.probe is None else self.probe.watch(past)

    def _handles(self) -> tuple[PackedTensor, PackedTensor]:
        step = self.step_past()
        return PackedTensor(step, "keys"), PackedTensor(step, "values")

    @property
    def keys(self) -> Tensor | None:
        """Handle of the keys; None before the first update."""
        return self._handles()[0] if self.is_initialized else None

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        self._refuse(value)

    @property
    def values(self) -> Tensor | None:
        """Handle of the values; None before the first update."""
        return self._handles()[1] if self.is_initialized else None

    @values.setter
    def values(self, value: Tensor | None) -> None:
        self._refuse(value)

    def _refuse(self, value: Tensor | None) -> None:
        if value is not None:
            raise TypeError(
                f"layer {self.layer_idx} keeps its keys and values packed; they cannot be assigned, use update()"
            )

    def get_seq_length(self) -> int:
        """Tokens held."""
        return 0 if self.store is None else self.store.length

    def memory(self) -> MemoryFigures:
        """True bytes of the layer."""
        if self.store is None:
            return MemoryFigures(0, 0, 0)
        center = self.store.codec.key.center
        size = 0 if center is None else center.nbytes
        return self.store.memory() + MemoryFigures(size, size, 0)

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

    def __deepcopy__(self, memo: dict[int, Any]) -> TurboQuantLayer:
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        if self.store is not None:
            # Neither belongs to one cache: a provider may hold compiled kernels and device scratch.
            memo[id(self.store.provider)] = self.store.provider
            memo[id(self.store.codec)] = self.store.codec
        vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied

    def offload(self) -> None:
        """Move the pages to the CPU until the next update; attention keeps what it was handed."""
        if self.store is not None:
            self.store.move("cpu")

    def prefetch(self) -> None:
        """Move the pages back to the device of the layer."""
        if self.store is not None and self.store.device != self.device:
            self.store.move(self.device)
