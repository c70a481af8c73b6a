"""A Transformers cache whose full-attention layers keep their past packed."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from turboquant_core import Windows

from .compat import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from .held_text import HeldText
from .layer import TurboQuantLayer
from .memory import CacheMemory
from .options import Bits, CacheOptions, CenterKeys, CompressV
from .padding import Padding
from .sliding_layer import TurboQuantSlidingLayer
from .storage import fingerprint, load_layers, save_layers
from .summary import LayerSummary, Summary

if TYPE_CHECKING:
    from .verify import Verification


class TurboQuantCache(DynamicCache):
    """Drop-in for ``DynamicCache``: pass it as ``cache`` (``past_key_values`` before Transformers 5.24).

    Full-attention layers are packed, and sliding-window layers on demand; linear-attention and other special layers
    stay as Transformers makes them, and :meth:`summary` says so. Works on an untouched model (its
    ``scaled_dot_product_attention`` is intercepted) and on a patched one (:func:`turboquant_hf.patch_model`).

    A cache belongs to one conversation: start an unrelated prompt with a new cache or after :meth:`reset`.

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
            large offset (:attr:`Verification.layers` shows it). Attention does not change, except that layers with
            soft-capped scores or attention sinks are decoded then. In place of the prompt's mean, fixed ones may be
            given: a tensor ``[kv_heads, head_dim]`` for each layer, as a mapping (layers that it lacks are not
            centred), a sequence or a stacked tensor.
        sink_tokens: first visible tokens of each sequence that stay in full precision. The mask shows where a
            left-padded sequence begins: a patched model tells the cache, otherwise call :meth:`note_padding`.
        recent_tokens: last tokens that stay in full precision; a token is packed once, when it leaves this window.
        start_after: pack nothing before the context has more tokens than this; until then layers are as
            Transformers makes them.
        compress_sliding: pack sliding-window layers too (without sinks).
        offloading: keep layers on the CPU between their updates, prefetched one ahead; needs CUDA.
        offload_only_non_sliding: leave sliding-window layers where they are.

    Raises:
        ValueError: an option is out of range, or the model has no layer that can be packed.

    Attributes:
        verification: what :func:`patch_model` measured; None for a cache made here.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        bits: Bits = 4,
        *,
        compress_v: CompressV = True,
        seed: int = 42,
        page_size: int = 64,
        provider: str | None = None,
        center_keys: CenterKeys = False,
        sink_tokens: int = 0,
        recent_tokens: int = 0,
        start_after: int = 0,
        compress_sliding: bool = False,
        offloading: bool = False,
        offload_only_non_sliding: bool = False,
    ) -> None:
        super().__init__(config=config, offloading=offloading, offload_only_non_sliding=offload_only_non_sliding)
        windows = Windows(sink_tokens, recent_tokens, start_after)
        self._fingerprint = fingerprint(config)
        self.text = HeldText()
        self.padding = Padding(is_wanted=sink_tokens > 0)
        self.verification: Verification | None = None
        self.options = CacheOptions(bits, compress_v, seed, page_size, provider, center_keys, windows, compress_sliding)
        self.layers = [self._packed(index, layer) for index, layer in enumerate(self.layers)]
        if not any(isinstance(layer, TurboQuantLayer) for layer in self.layers):
            kinds = sorted({type(layer).__name__ for layer in self.layers}) or ["none"]
            raise ValueError(
                f"{type(config).__name__} has no layer to pack (its layers: {', '.join(kinds)}): use DynamicCache for "
                "this model, or compress_sliding=True where its layers have sliding windows"
            )

    def _packed(self, index: int, layer: Any) -> Any:
        # Exactly these types: subclasses keep more than keys and values.
        if type(layer) is DynamicLayer:
            return TurboQuantLayer(index, len(self.layers), self.options, self.padding)
        if self.options.compress_sliding and type(layer) is DynamicSlidingWindowLayer:
            return TurboQuantSlidingLayer(index, len(self.layers), self.options, self.padding, layer.sliding_window)
        return layer

    def note_padding(self, attention_mask: Tensor) -> None:
        """Say where left-padded sequences begin, before a forward; a patched model does it.

        Args:
            attention_mask: ``[batch, tokens]``, nonzero where visible, cached tokens included.

        Raises:
            ValueError: another number of dimensions.
        """
        self.padding.note(attention_mask)

    def key_centers(self) -> dict[int, Tensor]:
        """Means that were subtracted, float32 ``[kv_heads, head_dim]`` by layer, to be given as ``center_keys``."""
        stores = {i: layer.store for i, layer in enumerate(self.layers) if isinstance(layer, TurboQuantLayer)}
        centers = {i: store.codec.key.center for i, store in stores.items() if store is not None}
        return {i: center for i, center in centers.items() if center is not None}

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` tokens of every layer."""
        super().crop(tokens_to_remove)
        self.text.crop(self.get_seq_length())

    def reset(self) -> None:
        """Forget everything: the next prompt may be any."""
        super().reset()  # type: ignore[no-untyped-call]
        self.text.forget()
        self.padding.forget()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Give sequence ``i`` the past of sequence ``beam_idx[i]``."""
        super().reorder_cache(beam_idx)
        self.text.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence ``repeats`` times."""
        super().batch_repeat_interleave(repeats)
        self.text.repeat(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences ``indices`` (integers or a boolean mask)."""
        super().batch_select_indices(indices)
        self.text.select(indices)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything that is held to a safetensors file, which appears whole or not at all.

        Raises:
            CacheFileError: a layer is not packed.
        """
        save_layers(path, self.layers, self._header(), self.text.ids)

    def load(self, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> None:
        """Hold what :meth:`save` wrote, in place of what is held now.

        Args:
            path: of the file.
            device: of the model.

        Raises:
            CacheFileError: the file is no packed cache, is truncated, or is of another model configuration, layout
                version or options; the cache is empty then. The weights of the model are not compared.
            FileNotFoundError: there is no such file.
        """
        self.reset()
        ids = load_layers(path, self.layers, self._header(), torch.device(device))
        if ids is not None:
            self.text.note(ids)

    def _header(self) -> dict[str, Any]:
        return {"model": self._fingerprint, "seed": self.options.seed, "page_size": self.options.page_size}

    def memory(self) -> CacheMemory:
        """True bytes of all layers, packed or not."""
        return CacheMemory.of(self.layers)

    def summary(self) -> Summary:
        """Each layer with its path, calls and bytes; print it."""
        return Summary(tuple(LayerSummary.of(index, layer) for index, layer in enumerate(self.layers)))
