"""A Transformers cache whose full-attention layers keep their past packed."""

from __future__ import annotations

import os
from typing import Any, Literal

import torch
from transformers import PreTrainedConfig

from .arguments import checks_config_and_names
from .compat import (
    RESET_KEEPS_LENGTH,
    DynamicCache,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
)
from .layer import TurboQuantLayer
from .options import Bits, CacheOptions, CenterKeys, CompressV, windows_of
from .packed_cache import PackedCache
from .shaping import Shaping
from .sliding_layer import TurboQuantSlidingLayer
from .special_layer import TurboQuantHybridLayer, TurboQuantHybridSlidingLayer, TurboQuantIndexedLayer, linear_state
from .storage import load_layers, save_layers


class TurboQuantCache(PackedCache, DynamicCache):
    """Drop-in for ``DynamicCache``: pass it as ``cache`` (``past_key_values`` before Transformers 5.24).

    Full-attention layers are packed, and sliding-window layers on demand; a Mamba state or the keys of an indexer that
    a layer has besides stay as they are. Linear-attention and other special layers stay as Transformers makes them, and
    :meth:`summary` says so. Works on an untouched model (its
    ``scaled_dot_product_attention`` is intercepted) and on a patched one (:func:`turboquant_hf.patch_model`).

    A cache belongs to one conversation: start an unrelated prompt with a new cache or after :meth:`reset`;
    ``generate`` refuses it on a used one.

    Args:
        config: of the model.
        bits: 2, 2.5, 3, 3.5 or 4, or a pair (keys, values); or these for each layer, as a mapping from its index or as
            a callable ``layer_idx -> bits``.
        compress_v: True, False, ``"boundary"`` (first and last two layers keep values in full precision) or a
            callable ``(layer_idx, n_layers) -> bool``.
        seed: rotation seed.
        page_size: tokens of a page, a multiple of 16.
        provider: kernel provider by name; None selects one.
        center_keys: subtract the mean key of the prompt, per KV head, before packing: for models whose keys share a
            large offset. ``"auto"`` does so in heads where the offset is most of the energy (60 %; 85 % in prompts of
            fewer than 256 tokens, of at least 16); True in all, False in none. Attention does not change, except that
            layers with soft-capped scores or attention sinks are decoded then; ``"auto"`` leaves such models alone. In
            place of the prompt's mean, fixed ones may be given: a tensor ``[kv_heads, head_dim]`` for each layer, as a
            mapping (layers that it lacks are not centred), a sequence or a stacked tensor.
        sink_tokens: first visible tokens of each sequence that stay in full precision. The mask shows where a
            left-padded sequence begins: ``generate`` and a patched model tell the cache, otherwise call
            :meth:`note_padding`.
        recent_tokens: last tokens that stay in full precision; a token is packed once, when it leaves this window.
            None for 16.
        start_after: pack nothing before the context has more tokens than this; until then layers are as
            Transformers makes them.
        compress_sliding: pack sliding-window layers too (without sinks).
        shaped: codes of prompts with errors where this model does not look, in the same bytes: weights from
            :func:`turboquant_hf.measure_shaping`, which ``patch_model(shaped=True)`` calls.
        offloading: keep layers on the CPU between their updates, prefetched one ahead; needs CUDA.
        offload_only_non_sliding: leave sliding-window layers where they are.

    Raises:
        ValueError: ``config`` is none, an option is out of range, the model has no layer that can be packed, or there
            is no CUDA device to offload from.
        TypeError: there is no such option.
    """

    _stock = "DynamicCache"

    @checks_config_and_names
    def __init__(
        self,
        config: PreTrainedConfig,
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
        shaped: Shaping | Literal[False] = False,
        offloading: bool = False,
        offload_only_non_sliding: bool = False,
    ) -> None:
        if offloading and not torch.cuda.is_available():
            raise ValueError("offloading keeps layers on the CPU beside a CUDA device, and there is none: leave it out")
        super().__init__(config=config, offloading=offloading, offload_only_non_sliding=offload_only_non_sliding)
        windows = windows_of(sink_tokens, recent_tokens, start_after)
        options = CacheOptions(
            bits, compress_v, seed, page_size, provider, center_keys, windows, compress_sliding, shaped
        )
        self._pack_layers(config, options)

    def _packed(self, index: int, layer: Any) -> Any:
        kind, place = type(layer), (index, len(self.layers), self.options, self.padding)
        # Exactly these types: others keep what no class here knows of.
        if kind is DynamicLayer:
            return TurboQuantLayer(*place)
        if kind is DynamicIndexedLayer:
            return TurboQuantIndexedLayer(layer, *place)
        if kind is LinearAttentionAndFullAttentionLayer:
            return TurboQuantHybridLayer(linear_state(layer), *place)
        if self.options.compress_sliding and kind is DynamicSlidingWindowLayer:
            return TurboQuantSlidingLayer(*place, layer.sliding_window)
        if self.options.compress_sliding and kind is LinearAttentionAndSlidingWindowAttentionLayer:
            return TurboQuantHybridSlidingLayer(linear_state(layer), *place, layer.sliding_window)
        return layer

    def reset(self) -> None:
        """Forget everything: the next prompt may be any."""
        super().reset()
        for layer in self.layers:
            if RESET_KEEPS_LENGTH and isinstance(layer, DynamicLayer):
                layer.keys = layer.values = None
                layer.is_initialized = False

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything that is held to a safetensors file, which appears whole or not at all.

        Raises:
            CacheFileError: a layer is not packed.
            OSError: ``path`` is a folder or lies in none, or cannot be written.
        """
        save_layers(path, self.layers, self._header(), self.text.ids)

    def load(self, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> None:
        """Hold what :meth:`save` wrote, in place of what is held now.

        Args:
            path: of the file.
            device: of the model.

        Raises:
            CacheFileError: the file is no packed cache or a folder, is truncated, or is of another model configuration,
                layout version or options; the cache is empty then. The weights of the model are not compared.
            FileNotFoundError: there is no such file.
        """
        self.reset()
        ids = load_layers(path, self.layers, self._header(), torch.device(device))
        if ids is not None:
            self.text.note(ids)
