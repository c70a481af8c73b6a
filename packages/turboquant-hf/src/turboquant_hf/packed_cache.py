"""What a packed cache has, whether it grows or not."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from .automatic_center import may_center
from .compat import Cache, LinearAttentionCacheLayerMixin
from .generation import watch_generate
from .held_text import HeldText
from .memory import CacheMemory
from .options import CacheOptions
from .packed_layer import PackedLayer
from .padding import Padding
from .storage import fingerprint
from .summary import LayerSummary, Summary

if TYPE_CHECKING:
    from .verify import Verification


class PackedCache(Cache):
    """A cache with packed layers: :class:`TurboQuantCache` or :class:`TurboQuantStaticCache`.

    Attributes:
        verification: what :func:`patch_model` measured; None for a cache made here.
    """

    layers: list[Any]
    room: int | None = None
    """Tokens that a sequence may have; None where the cache grows."""
    _stock: ClassVar[str]

    def _pack_layers(self, config: PreTrainedConfig, options: CacheOptions) -> None:
        """Put packed layers in the place of those that can be packed.

        Raises:
            ValueError: there is none.
        """
        if options.center_keys == "auto" and not may_center(config):
            options = replace(options, center_keys=False)
        self._fingerprint = fingerprint(config)
        self.text = HeldText()
        self.padding = Padding(is_wanted=options.windows.sink_tokens > 0)
        self.verification: Verification | None = None
        self.options = options
        self.layers = [self._packed(index, layer) for index, layer in enumerate(self.layers)]
        if not any(isinstance(layer, PackedLayer) for layer in self.layers):
            kinds = sorted({type(layer).__name__ for layer in self.layers}) or ["none"]
            raise ValueError(
                f"{type(config).__name__} has no layer to pack (its layers: {', '.join(kinds)}): use {self._stock} "
                "for this model, or compress_sliding=True where its layers have sliding windows"
            )
        watch_generate()

    def _packed(self, index: int, layer: Any) -> Any:
        """The packed layer for ``layer``, or ``layer``."""
        raise NotImplementedError

    @property
    def has_past(self) -> bool:
        """Whether tokens are held."""
        return int(self.get_seq_length()) > 0

    def check_generate(self) -> None:
        """Raise ``ValueError`` when ``generate`` must not be called over this cache, whatever the prompt is."""

    def check_room(self, tokens: int) -> None:
        """Raise ``ValueError`` when sequences of ``tokens`` tokens do not fit."""
        if self.room is not None and tokens > self.room:
            raise ValueError(
                f"{tokens} tokens do not fit into a static cache with max_cache_len = {self.room}: make it with more "
                "room, or generate fewer tokens"
            )

    def note_padding(self, attention_mask: Tensor) -> None:
        """Say where left-padded sequences begin, before a forward; ``generate`` and a patched model do it.

        Args:
            attention_mask: ``[batch, tokens]``, nonzero where visible, cached tokens included.

        Raises:
            ValueError: another number of dimensions.
        """
        self.padding.note(attention_mask)

    def key_centers(self) -> dict[int, Tensor]:
        """Means that were subtracted, float32 ``[kv_heads, head_dim]`` by layer, to be given as ``center_keys``."""
        stores = {i: layer.store for i, layer in enumerate(self.layers) if isinstance(layer, PackedLayer)}
        centers = {i: store.codec.key.center for i, store in stores.items() if store is not None}
        return {i: center for i, center in centers.items() if center is not None}

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` tokens of every layer.

        Raises:
            RuntimeError: a layer no longer has what it would show then: a linear-attention state, a sliding window.
        """
        # Those first which may refuse, so that nothing has changed then.
        for layer in sorted(self.layers, key=_can_always_go_back):
            layer.crop(tokens_to_remove)
        self.text.crop(int(self.get_seq_length()))

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
        """Repeat every sequence ``repeats`` times.

        Raises:
            ValueError: a layer cannot; nothing has changed then.
        """
        self._check_each_can("batch_repeat_interleave")
        super().batch_repeat_interleave(repeats)
        self.text.repeat(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences ``indices`` (integers or a boolean mask).

        Raises:
            ValueError: a layer cannot; nothing has changed then.
        """
        self._check_each_can("batch_select_indices")
        super().batch_select_indices(indices)
        self.text.select(indices)

    def _check_each_can(self, operation: str) -> None:
        for index, layer in enumerate(self.layers):
            kept = getattr(layer, "state", layer)
            if not hasattr(kept, operation):
                raise ValueError(
                    f"layer {index} keeps a {type(kept).__name__}, which has no {operation}(): begin with as many "
                    "sequences as are needed, or use reorder_cache()"
                )

    def _header(self) -> dict[str, Any]:
        return {"model": self._fingerprint, "seed": self.options.seed, "page_size": self.options.page_size}

    def memory(self) -> CacheMemory:
        """True bytes of all layers, packed or not."""
        return CacheMemory.of(self.layers)

    def summary(self) -> Summary:
        """Each layer with its path, calls and bytes; print it."""
        return Summary(tuple(LayerSummary.of(index, layer) for index, layer in enumerate(self.layers)))


def _can_always_go_back(layer: Any) -> bool:
    return not (isinstance(layer, LinearAttentionCacheLayerMixin) or getattr(layer, "is_sliding", False))
