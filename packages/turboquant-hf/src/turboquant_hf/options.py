"""What a user chooses for a cache, checked once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Literal, TypeAlias

from torch import Tensor

from turboquant_core import Windows
from turboquant_core.layout import bits_pair, check_page_size
from turboquant_core.preset import Preset
from turboquant_core.rotation import check_seed
from turboquant_core.scale import CACHE_RULE, ScaleRule

from .automatic_center import automatic_center
from .shaping import Shaping

LayerBits: TypeAlias = float | tuple[float, float]
Bits: TypeAlias = LayerBits | Mapping[int, LayerBits] | Callable[[int], LayerBits]
CompressV: TypeAlias = bool | Literal["boundary"] | Callable[[int, int], bool]
CenterKeys: TypeAlias = bool | Literal["auto"] | Mapping[int, Tensor] | Sequence[Tensor] | Tensor

BOUNDARY_LAYERS = 2
"""``compress_v="boundary"`` keeps the values of this many first and last layers in full precision."""
RECENT_TOKENS = 16
"""Last tokens in full precision where ``recent_tokens`` is None: at 4096 tokens under 2 % of the bytes."""


def windows_of(sink_tokens: int, recent_tokens: int | None, start_after: int) -> Windows:
    """Windows of a cache's arguments.

    Raises:
        ValueError: a number is negative.
    """
    return Windows(sink_tokens, RECENT_TOKENS if recent_tokens is None else recent_tokens, start_after)


@dataclass(frozen=True, slots=True, eq=False)
class CacheOptions:
    """Options of a packed cache; :class:`TurboQuantCache` says what they mean.

    Raises:
        ValueError: an option is outside its range.
    """

    bits: Bits = 4
    compress_v: CompressV = True
    seed: int = 42
    page_size: int = 64
    provider: str | None = None
    center_keys: CenterKeys = False
    windows: Windows = Windows()  # noqa: RUF009 (immutable)
    compress_sliding: bool = False
    shaped: Shaping | Literal[False] = False
    scale_rule: ScaleRule = CACHE_RULE

    def __post_init__(self) -> None:
        given: object = self.bits
        if given == "auto" or isinstance(given, Preset | PathLike):
            raise ValueError(f"bits is {given!r}: a cache takes numbers; patch_model and turboquant take presets")
        if isinstance(self.bits, Mapping):
            for layer_idx, bits in self.bits.items():
                bits_pair(bits, f" for layer {layer_idx}")
        elif not callable(self.bits):
            bits_pair(self.bits)
        if not (isinstance(self.compress_v, bool) or callable(self.compress_v) or self.compress_v == "boundary"):
            raise ValueError(
                f"compress_v is {self.compress_v!r}; it must be True, False, 'boundary' or a callable "
                "(layer_idx, n_layers) -> bool"
            )
        object.__setattr__(self, "page_size", check_page_size(self.page_size))
        object.__setattr__(self, "seed", check_seed(self.seed))
        is_center = isinstance(self.center_keys, bool | Mapping | list | tuple | Tensor)
        if not is_center and self.center_keys != "auto":
            raise ValueError(
                f"center_keys is {self.center_keys!r}; it must be 'auto', True, False, or a tensor "
                "[kv_heads, head_dim] for each layer, by index"
            )
        if self.shaped is not False and not isinstance(self.shaped, Shaping):
            raise ValueError(
                f"shaped is {self.shaped!r}; a cache takes what measure_shaping(model, ids) gives; patch_model and "
                "turboquant take True and measure"
            )

    def layer_bits(self, layer_idx: int) -> tuple[float, float]:
        """Bits of the keys and of the values of a layer.

        Raises:
            ValueError: a mapping has no entry for the layer, or a callable gave no bits.
        """
        where = f" for layer {layer_idx}"
        if isinstance(self.bits, Mapping):
            if layer_idx not in self.bits:
                raise ValueError(
                    f"bits has no entry{where}, which is packed; it has {sorted(self.bits)}: give one for the index of "
                    "each layer, or a pair (keys, values) for all"
                )
            return bits_pair(self.bits[layer_idx], where)
        return bits_pair(self.bits(layer_idx) if callable(self.bits) else self.bits, where)

    def packs_values(self, layer_idx: int, n_layers: int) -> bool:
        """Whether layer ``layer_idx`` of ``n_layers`` packs its values."""
        if isinstance(self.compress_v, bool):
            return self.compress_v
        if self.compress_v == "boundary":
            return BOUNDARY_LAYERS <= layer_idx < n_layers - BOUNDARY_LAYERS
        return bool(self.compress_v(layer_idx, n_layers))

    def center(self, layer_idx: int, keys: Tensor) -> Tensor | None:
        """What is subtracted from the keys of a layer, float ``[kv_heads, head_dim]``.

        Args:
            layer_idx: position in the model; one that a mapping lacks is not centred.
            keys: the first keys ``[batch, kv_heads, tokens, head_dim]``.

        Raises:
            ValueError: there are fewer means than layers.
        """
        given = self.center_keys
        if isinstance(given, str):
            return automatic_center(keys)
        if isinstance(given, bool):
            return keys.float().mean(dim=(0, 2)) if given else None
        if isinstance(given, Mapping):
            return given.get(layer_idx)
        if layer_idx >= len(given):
            raise ValueError(f"center_keys has means for {len(given)} layers, none for layer {layer_idx}")
        return given[layer_idx]
