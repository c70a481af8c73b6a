"""What a user chooses for a cache, checked once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from turboquant_core.layout import BITS, PAGE_SIZE_MULTIPLE, check_bits

Bits: TypeAlias = float | tuple[float, float]
CompressV: TypeAlias = bool | Literal["boundary"] | Callable[[int, int], bool]

BOUNDARY_LAYERS = 2
"""``compress_v="boundary"`` keeps the values of this many first and last layers in full precision."""


@dataclass(frozen=True, slots=True)
class CacheOptions:
    """Options of a packed cache.

    Args:
        bits: 2, 2.5, 3, 3.5 or 4, or a pair (keys, values).
        compress_v: whether values are packed: for all layers, all but the boundary layers, or
            ``compress_v(layer_idx, n_layers)``.
        seed: rotation seed.
        page_size: tokens of a page.
        provider: kernel provider by name; None selects one.
        center_keys: subtract the mean key of the prompt before packing.

    Raises:
        ValueError: an option is outside its range.
    """

    bits: Bits = 4
    compress_v: CompressV = True
    seed: int = 42
    page_size: int = 64
    provider: str | None = None
    center_keys: bool = False

    def __post_init__(self) -> None:
        pair = self.bits if isinstance(self.bits, tuple) else (self.bits, self.bits)
        if len(pair) != 2:
            raise ValueError(f"bits is {self.bits!r}; choose one of {BITS}, or a pair (keys, values) of them")
        for bits in pair:
            check_bits(bits)
        if not (isinstance(self.compress_v, bool) or callable(self.compress_v) or self.compress_v == "boundary"):
            raise ValueError(
                f"compress_v is {self.compress_v!r}; it must be True, False, 'boundary' or a callable "
                "(layer_idx, n_layers) -> bool"
            )
        if self.page_size < PAGE_SIZE_MULTIPLE or self.page_size % PAGE_SIZE_MULTIPLE:
            raise ValueError(f"page_size is {self.page_size}; it must be a positive multiple of {PAGE_SIZE_MULTIPLE}")

    @property
    def key_bits(self) -> float:
        """Bits of a key coordinate."""
        return self.bits[0] if isinstance(self.bits, tuple) else self.bits

    @property
    def value_bits(self) -> float:
        """Bits of a value coordinate, where values are packed."""
        return self.bits[1] if isinstance(self.bits, tuple) else self.bits

    def packs_values(self, layer_idx: int, n_layers: int) -> bool:
        """Whether layer ``layer_idx`` of ``n_layers`` packs its values."""
        if isinstance(self.compress_v, bool):
            return self.compress_v
        if self.compress_v == "boundary":
            return BOUNDARY_LAYERS <= layer_idx < n_layers - BOUNDARY_LAYERS
        return bool(self.compress_v(layer_idx, n_layers))
