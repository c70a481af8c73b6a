"""A packed cache of fixed room, for compiled models and CUDA graphs."""

from __future__ import annotations

import os
from typing import Any, NoReturn

import torch
from transformers import PreTrainedConfig

from .arguments import checks_config_and_names
from .compat import (
    GENERATE_MASKS_LACK_WINDOWS,
    LinearAttentionAndStaticFullAttentionLayer,
    LinearAttentionAndStaticSlidingWindowAttentionLayer,
    LinearAttentionCacheLayerMixin,
    StaticCache,
    StaticIndexedLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)
from .options import Bits, CacheOptions, CenterKeys, CompressV, windows_of
from .packed_cache import PackedCache
from .special_layer import linear_state
from .static_layer import TurboQuantStaticLayer
from .static_sliding_layer import TurboQuantStaticSlidingLayer
from .static_special_layer import (
    TurboQuantStaticHybridLayer,
    TurboQuantStaticHybridSlidingLayer,
    TurboQuantStaticIndexedLayer,
)


class TurboQuantStaticCache(PackedCache, StaticCache):
    """Drop-in for ``StaticCache``: all pages are there from the first update on, and no step reads a length.

    A decode step over it compiles to one graph (``torch.compile(fullgraph=True)``), which CUDA graphs may record. What
    is attended to is the same as with :class:`turboquant_hf.TurboQuantCache`, whose options it has.

    The batch size is that of the first update. ``reset()`` empties the cache for another prompt and keeps the pages,
    and with them the compiled graphs. Sequences can be reordered (beams) and cropped, not repeated, selected, offloaded
    or saved.

    A Mamba state, which cannot be cropped, or the keys of an indexer that a layer has besides stay as they are.
    Sliding-window layers that are not packed (``compress_sliding=False``), linear-attention and other special layers
    are as in ``StaticCache``.

    Args:
        config: of the model.
        max_cache_len: tokens that a sequence may have, the prompt included. More are an error: on a GPU one that stops
            the device, except in ``generate``.
        bits: as all that follow, see :class:`turboquant_hf.TurboQuantCache`.
        compress_v: which layers pack values.
        seed: rotation seed.
        page_size: tokens of a page.
        provider: kernel provider by name. The reference computes compiled steps too, but not in CUDA graphs.
        center_keys: what is subtracted from keys.
        sink_tokens: first visible tokens that stay in full precision; a compiled step needs to know of left padding,
            which a patched model tells, or :meth:`note_padding`.
        recent_tokens: last tokens that stay in full precision, besides being packed; None for 16.
        start_after: tokens before which everything is attended to in full precision.
        compress_sliding: pack sliding-window layers too.

    Raises:
        ValueError: ``config`` is none, an option is out of range, or the model has no layer that can be packed.
        TypeError: there is no such option.
    """

    _stock = "StaticCache"
    room: int

    @checks_config_and_names
    def __init__(
        self,
        config: PreTrainedConfig,
        max_cache_len: int,
        bits: Bits = 4,
        *,
        compress_v: CompressV = True,
        seed: int = 42,
        page_size: int = 64,
        provider: str | None = None,
        center_keys: CenterKeys = "auto",
        sink_tokens: int = 0,
        recent_tokens: int | None = None,
        start_after: int = 0,
        compress_sliding: bool = False,
    ) -> None:
        if type(max_cache_len) is not int or max_cache_len < 1:
            raise ValueError(f"max_cache_len is {max_cache_len!r}; it must be a number of tokens, at least 1")
        super().__init__(config=config, max_cache_len=max_cache_len)
        self.room = max_cache_len
        windows = windows_of(sink_tokens, recent_tokens, start_after)
        options = CacheOptions(bits, compress_v, seed, page_size, provider, center_keys, windows, compress_sliding)
        self._pack_layers(config, options)

    def _packed(self, index: int, layer: Any) -> Any:
        kind, place = type(layer), (index, len(self.layers), self.options, self.padding, self.room)
        # Exactly these types: others keep what no class here knows of.
        if kind is StaticLayer:
            return TurboQuantStaticLayer(*place)
        if kind is StaticIndexedLayer:
            return TurboQuantStaticIndexedLayer(layer, *place)
        if kind is LinearAttentionAndStaticFullAttentionLayer:
            return TurboQuantStaticHybridLayer(linear_state(layer), *place)
        # The stock layer has the smaller of window and room, and beyond the room nothing slides.
        if self.options.compress_sliding and kind is StaticSlidingWindowLayer:
            return TurboQuantStaticSlidingLayer(*place, layer.max_cache_len)
        if self.options.compress_sliding and kind is LinearAttentionAndStaticSlidingWindowAttentionLayer:
            return TurboQuantStaticHybridSlidingLayer(linear_state(layer), *place, layer.max_cache_len)
        return layer

    def check_generate(self) -> None:
        """Raise ``ValueError`` when ``generate`` would prepare other masks for this cache than the model makes."""
        is_hit = (
            isinstance(x, LinearAttentionCacheLayerMixin) and getattr(x, "is_sliding", False) for x in self.layers
        )
        if GENERATE_MASKS_LACK_WINDOWS and any(is_hit):
            raise ValueError(
                "layers of this model have a sliding window and a linear-attention state, and generate() of this "
                "release of Transformers would show them all of the past in a static cache: use TurboQuantCache "
                "(without max_cache_len), or call the model itself"
            )

    @property
    def has_past(self) -> bool:
        """Whether an update came since the cache was made or reset."""
        return any(getattr(layer, "has_past", False) for layer in self.layers)

    def save(self, path: str | os.PathLike[str]) -> NoReturn:
        """Always an error: a static cache is not saved."""
        raise ValueError(
            f"a static cache cannot be saved to {path}: run the prompt over a TurboQuantCache and save that"
        )

    def load(self, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> NoReturn:
        """Always an error: a static cache is not loaded."""
        raise ValueError(f"a static cache cannot load {path} to {device}: load it into a TurboQuantCache")
