"""One layer of the cache: raw keys and values at the first call, packed handles afterwards."""

from __future__ import annotations

import copy
from typing import Any

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
    select_provider,
)

from .compat import DynamicLayer
from .counters import LayerCounters
from .handle import PackedTensor, StepPast
from .options import CacheOptions


class TurboQuantLayer(DynamicLayer):
    """A full-attention layer whose past is packed.

    Args:
        layer_idx: position in the model.
        n_layers: layers of the model.
        options: of the cache.
    """

    def __init__(self, layer_idx: int, n_layers: int, options: CacheOptions) -> None:
        self.store: PackedSequences | None = None
        self.layer_idx = layer_idx
        self.options = options
        self.packs_values = options.packs_values(layer_idx, n_layers)
        self.counters = LayerCounters()
        super().__init__()  # type: ignore[no-untyped-call]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Create the pages from the first keys ``[batch, kv_heads, tokens, head_dim]`` and values.

        Raises:
            LayoutError: the head_dim cannot be packed; names the layer.
            ProviderError: no kernel provider fits.
        """
        self.dtype, self.device = key_states.dtype, key_states.device
        try:
            layout = self._layout(key_states, value_states)
            center = key_states.float().mean(dim=(0, 2)) if self.options.center_keys else None
            codec = CacheCodec.create(layout, seed=self.options.seed, center=center, device=self.device)
        except LayoutError as error:
            raise LayoutError(f"layer {self.layer_idx} cannot be packed: {error}") from error
        provider = select_provider(KernelRequest(layout, self.device, self.dtype), self.options.provider)
        self.store = PackedSequences(key_states.shape[0], codec, provider, self.dtype)
        self.is_initialized = True

    def _layout(self, key: Tensor, value: Tensor) -> PageLayout:
        packed = VectorLayout(value.shape[-1], self.options.value_bits, "cubic") if self.packs_values else None
        return PageLayout(
            key=VectorLayout(key.shape[-1], self.options.key_bits, "int8"),
            value=packed or RawLayout(value.shape[-1], self.dtype.itemsize),
            page_size=self.options.page_size,
            kv_heads=key.shape[1],
        )

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add keys and values; return what attention should use.

        The first call returns its arguments, so that a prompt is attended to in full precision by the model's own
        kernel; later calls return :class:`PackedTensor` handles of the whole past.

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
        first = store.length == 0
        # Raw values are stored as they are, so that one dtype must do for the whole past.
        store.append(key_states, value_states.to(self.dtype))
        return (key_states, value_states) if first else self._handles()

    @property
    def packed_sequences(self) -> PackedSequences:
        """The pages.

        Raises:
            RuntimeError: before the first update.
        """
        if self.store is None:
            raise RuntimeError(f"layer {self.layer_idx} holds no tokens yet")
        return self.store

    def _handles(self) -> tuple[PackedTensor, PackedTensor]:
        step = StepPast(self.packed_sequences.past(), self.dtype, self.counters)
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
        """Refused: packed pages are small and stay on the device.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "a packed cache cannot be offloaded yet: leave offloading=False; packed pages are a quarter of the size"
        )
