"""True bytes of a cache, against its dtype and against 16 bits a coordinate."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from turboquant_core import MemoryFigures

from .packed_layer import PackedLayer


@dataclass(frozen=True, slots=True)
class CacheMemory(MemoryFigures):
    """Bytes of a whole cache, packed layers and others; ``stored``, ``allocated`` and ``uncompressed`` as in core.

    Attributes:
        bf16: bytes that the same tokens take in bf16, whatever dtype the model runs in.
    """

    bf16: int

    @property
    def bf16_ratio(self) -> float:
        """``bf16 / stored``; 1.0 for an empty cache."""
        return self.bf16 / self.stored if self.stored else 1.0

    @classmethod
    def of(cls, layers: list[Any]) -> CacheMemory:
        """Sum over the layers of a cache."""
        total, bf16 = MemoryFigures(0, 0, 0), 0
        for layer in layers:
            figures = layer.memory() if isinstance(layer, PackedLayer) else dense_memory(layer)
            total += figures
            bf16 += figures.uncompressed * torch.bfloat16.itemsize // _itemsize(layer)
        return cls(total.stored, total.allocated, total.uncompressed, bf16)


def dense_memory(layer: Any) -> MemoryFigures:
    """Bytes of a layer that Transformers keeps, whatever is in it, compared with themselves."""
    size = sum(tensor.nbytes for tensor in tensors_of(layer))
    return MemoryFigures(size, size, size)


def tensors_of(layer: Any) -> list[Tensor]:
    """Floating-point tensors of a layer that Transformers keeps, or in a mapping of it: no counters, no positions."""
    values = vars(layer).values()
    held = chain.from_iterable(value.values() if isinstance(value, dict) else (value,) for value in values)
    return [tensor for tensor in held if isinstance(tensor, Tensor) and tensor.is_floating_point()]


def _itemsize(layer: Any) -> int:
    """Bytes of a coordinate in the dtype of the layer."""
    if isinstance(layer, PackedLayer):
        return layer.dtype.itemsize if layer.is_initialized else torch.bfloat16.itemsize
    return max((tensor.itemsize for tensor in tensors_of(layer)), default=torch.bfloat16.itemsize)
