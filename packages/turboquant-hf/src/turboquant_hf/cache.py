"""A Transformers cache whose full-attention layers keep their past packed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from .compat import DynamicCache, DynamicLayer
from .held_text import HeldText
from .layer import TurboQuantLayer
from .memory import CacheMemory
from .options import Bits, CacheOptions, CompressV
from .summary import LayerSummary, Summary

if TYPE_CHECKING:
    from .verify import Verification


class TurboQuantCache(DynamicCache):
    """Drop-in for ``DynamicCache``: pass it as ``cache`` (``past_key_values`` before Transformers 5.24).

    Full-attention layers are packed; sliding-window, linear-attention and other special layers stay as Transformers
    makes them, and :meth:`summary` says so. Works on an untouched model (its ``scaled_dot_product_attention`` is
    intercepted) and on a patched one (:func:`turboquant_hf.patch_model`).

    A cache belongs to one conversation: start an unrelated prompt with a new cache or after :meth:`reset`.

    Args:
        config: of the model.
        bits: 2, 3 or 4, or a pair (keys, values).
        compress_v: True, False, ``"boundary"`` (first and last two layers keep values in full precision) or a
            callable ``(layer_idx, n_layers) -> bool``.
        seed: rotation seed.
        page_size: tokens of a page, a multiple of 16.
        provider: kernel provider by name; None selects one.
        center_keys: subtract the mean key of the prompt, per KV head, before packing: for models whose keys share a
            large offset (:attr:`Verification.layers` shows it). Attention does not change, except that layers with
            soft-capped scores or attention sinks are decoded then.

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
        center_keys: bool = False,
    ) -> None:
        super().__init__(config=config)
        self.text = HeldText()
        self.verification: Verification | None = None
        self.options = CacheOptions(bits, compress_v, seed, page_size, provider, center_keys)
        n_layers = len(self.layers)
        self.layers = [
            # Exactly this type: subclasses keep more than keys and values.
            TurboQuantLayer(index, n_layers, self.options) if type(layer) is DynamicLayer else layer
            for index, layer in enumerate(self.layers)
        ]
        if not any(isinstance(layer, TurboQuantLayer) for layer in self.layers):
            kinds = sorted({type(layer).__name__ for layer in self.layers}) or ["none"]
            raise ValueError(
                f"{type(config).__name__} has no full-attention layer to pack (its layers: {', '.join(kinds)}); "
                "use DynamicCache for this model"
            )

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` tokens of every layer."""
        super().crop(tokens_to_remove)
        self.text.crop(self.get_seq_length())

    def reset(self) -> None:
        """Forget everything: the next prompt may be any."""
        super().reset()  # type: ignore[no-untyped-call]
        self.text.forget()

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

    def memory(self) -> CacheMemory:
        """True bytes of all layers, packed or not."""
        return CacheMemory.of(self.layers)

    def summary(self) -> Summary:
        """Each layer with its path, calls and bytes; print it."""
        return Summary(tuple(LayerSummary.of(index, layer) for index, layer in enumerate(self.layers)))
