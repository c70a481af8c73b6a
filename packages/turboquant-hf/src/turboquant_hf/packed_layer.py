"""What every packed layer has, whether its pages grow or not."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from turboquant_core import (
    CacheCodec,
    KernelProvider,
    KernelRequest,
    LayoutError,
    MemoryFigures,
    PageLayout,
    RawLayout,
    VectorLayout,
    WindowedPast,
    WindowedSequences,
    select_provider,
)
from turboquant_core.split_past import SplitPast
from turboquant_core.static_sequences import StaticSequences

from .counters import LayerCounters
from .handle import PackedTensor, StepPast
from .options import CacheOptions
from .padding import Padding

_OTHER_CACHES = "Transformers' DynamicCache and QuantizedCache take any head_dim"

Store = TypeVar("Store", WindowedSequences, StaticSequences)


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


class PackedLayer(ABC, Generic[Store]):
    """A layer of a cache whose keys and values are packed.

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

    is_initialized: bool

    def __init__(self, layer_idx: int, n_layers: int, options: CacheOptions, padding: Padding) -> None:
        self.store: Store | None = None
        self.layer_idx = layer_idx
        self.options = options
        self.bits = options.layer_bits(layer_idx)
        self.packs_values = options.packs_values(layer_idx, n_layers)
        self.windows = options.windows
        self.padding = padding
        self.counters = LayerCounters()
        self.probe: Probe | None = None

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
            rule = self.options.scale_rule
            codec = CacheCodec.create(
                layout, seed=self.options.seed, key_scale=rule, value_scale=rule, center=center, device=device
            )
        except LayoutError as error:
            raise LayoutError(f"layer {self.layer_idx} cannot be packed: {error}; {_OTHER_CACHES}") from error
        except ValueError as error:
            raise LayoutError(f"layer {self.layer_idx} cannot be packed: {error}") from error
        provider = select_provider(KernelRequest(layout, device, self.dtype), self.options.provider)
        if self.options.shaped:
            provider = self.options.shaped.provider(self.layer_idx, codec, provider, shape.batch)
        self.store = self._make_store(shape.batch, codec, provider)
        self.is_initialized = True

    @abstractmethod
    def _make_store(self, batch: int, codec: CacheCodec, provider: KernelProvider) -> Store:
        """Empty pages."""

    def _layout(self, shape: LayerShape) -> PageLayout:
        key_bits, value_bits = self.bits
        packed = VectorLayout(shape.value_head_dim, value_bits, "cubic") if self.packs_values else None
        return PageLayout(
            key=VectorLayout(shape.head_dim, key_bits, "int8"),
            value=packed or RawLayout(shape.value_head_dim, self.dtype.itemsize),
            page_size=self.options.page_size,
            kv_heads=shape.kv_heads,
        )

    def _check_batch(self, key_states: Tensor) -> None:
        batch = self.packed_sequences.batch
        if key_states.shape[0] != batch:
            raise ValueError(
                f"layer {self.layer_idx} holds {batch} sequences and got {key_states.shape[0]}: this cache "
                "belongs to another prompt; start a new cache, or call reset() on this one"
            )

    @property
    def packed_sequences(self) -> Store:
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

    def past(self) -> SplitPast:
        """Everything that is held."""
        return self.packed_sequences.past()

    def _handles(self, dtype: torch.dtype | None = None) -> tuple[PackedTensor, PackedTensor]:
        """Of keys and values; ``dtype`` is that of what the model compares them with, None for that of the cache."""
        step = self.step_past()
        step.dtype = dtype or step.dtype
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

    def memory(self) -> MemoryFigures:
        """True bytes of the layer."""
        if self.store is None:
            return MemoryFigures(0, 0, 0)
        center = self.store.codec.key.center
        size = 0 if center is None else center.nbytes
        return self.store.memory() + MemoryFigures(size, size, 0)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        if self.store is not None:
            # Neither belongs to one cache: a provider may hold compiled kernels and device scratch.
            memo[id(self.store.provider)] = self.store.provider
            memo[id(self.store.codec)] = self.store.codec
        vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied
