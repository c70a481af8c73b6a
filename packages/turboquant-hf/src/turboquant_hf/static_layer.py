"""A layer of a cache of fixed room: pages that are there from the start, and lengths on the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from turboquant_core import CacheCodec, KernelProvider
from turboquant_core.static_sequences import StaticSequences

from .compat import StaticLayer
from .options import CacheOptions
from .packed_layer import LayerShape, PackedLayer
from .padding import Padding
from .traced import TracedTensor


class TurboQuantStaticLayer(PackedLayer[StaticSequences], StaticLayer):
    """A full-attention layer of fixed room whose past is packed; see :class:`PackedLayer`.

    Args:
        layer_idx: position in the model.
        n_layers: layers of the model.
        options: of the cache.
        padding: of the cache's sequences.
        max_cache_len: tokens that a sequence may have.

    Attributes:
        has_past: whether an update came since the layer was made or reset: attention reads pages from then on.
    """

    room: int | None = None
    """Tokens that stay readable; None for all."""

    def __init__(
        self, layer_idx: int, n_layers: int, options: CacheOptions, padding: Padding, max_cache_len: int
    ) -> None:
        PackedLayer.__init__(self, layer_idx, n_layers, options, padding)
        StaticLayer.__init__(self, max_cache_len)
        self.has_past = False

    def create_store(self, shape: LayerShape, device: torch.device, center: Tensor | None) -> None:
        """Create the pages; see :meth:`PackedLayer.create_store`."""
        super().create_store(shape, device, center)
        self.batch_size = self.max_batch_size = shape.batch
        self.num_heads = shape.kv_heads
        # Without it, a compiler copies what a CUDA graph reads, or makes no CUDA graph.
        store = self.packed_sequences
        for codec in (store.codec.key, store.codec.value):
            if codec is not None:
                self._fix(codec.signs, codec.levels, codec.boundaries, codec.center)
        self._fix(*store.tensors, store.block_table)

    def _fix(self, *tensors: Tensor | None) -> None:
        for tensor in tensors:
            if tensor is not None:
                torch._dynamo.mark_static_address(tensor)

    def _make_store(self, batch: int, codec: CacheCodec, provider: KernelProvider) -> StaticSequences:
        return StaticSequences(batch, codec, provider, self.dtype, self.max_cache_len, self.windows, room=self.room)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Create the pages from keys ``[batch, kv_heads, tokens, head_dim]`` and values, of any number of tokens.

        Raises:
            LayoutError: the head_dim cannot be packed; names the layer.
            ProviderError: no kernel provider fits.
            RuntimeError: a graph is being traced.
            ValueError: ``center_keys=True`` and there are no keys; ``"auto"`` centres nothing then.
        """
        if torch.compiler.is_compiling():
            raise RuntimeError(
                f"layer {self.layer_idx} has no pages yet, and a compiled step cannot make them: run the prompt "
                "uncompiled, or call early_initialization() on the cache first"
            )
        if key_states.shape[2] or not isinstance(self.options.center_keys, bool | str):
            super().lazy_initialization(key_states, value_states)
            return
        if self.options.center_keys is True:
            raise ValueError("center_keys=True takes the mean of the prompt's keys, which early_initialization() lacks")
        self.create_store(LayerShape.of(key_states, value_states), key_states.device, None)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Add keys and values; return what attention should use.

        The first call returns its arguments, later ones handles with all of the room: :class:`PackedTensor`, or
        :class:`TracedTensor` while a graph is traced.

        Raises:
            ValueError: another number of sequences than the cache holds, or no room; off the CPU, a lack of room stops
                the device.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._check_batch(key_states)
        if self.probe is not None:
            self.probe.see(key_states, value_states)
        self._append(key_states, value_states)
        if not self.has_past:
            self.has_past = True
            return key_states, value_states
        return self._handles(key_states.dtype)

    def _append(self, key_states: Tensor, value_states: Tensor) -> None:
        store = self.packed_sequences
        # Raw values are stored as they are, so that one dtype must do for the whole past.
        store.append(key_states.detach(), value_states.detach().to(self.dtype), self.padding.starts(store.batch))

    def _handles(self, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
        if not torch.compiler.is_compiling():
            return super()._handles(dtype)
        step = self.step_past()
        step.dtype = dtype or step.dtype
        return TracedTensor(step, "keys"), TracedTensor(step, "values")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys of the coming update and the position of the first: the prompt, and all of the room from then on."""
        return (self.max_cache_len if self.has_past else query_length), 0

    def get_seq_length(self) -> Any:
        """Tokens held now: int64 scalar on the device, 0 before the first update."""
        # A copy: a model may ask before an update and read the answer after it.
        return self.store.filled.clone() if self.store is not None else 0

    def reset(self) -> None:
        """Forget every token; pages stay, so that compiled graphs and the batch size do."""
        self.has_past = False
        if self.store is not None:
            self.store.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` tokens; a positive number keeps that many (older Transformers)."""
        if self.store is None:
            return
        if tokens_to_remove > 0:
            self.store.keep_first(tokens_to_remove)
        else:
            self.store.drop_last(-tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Give sequence ``i`` the past of sequence ``beam_idx[i]``."""
        if self.store is not None:
            self.store.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Refused: see the error."""
        self._refuse_batch(f"repeat each sequence {repeats} times")

    def batch_select_indices(self, indices: Tensor) -> None:
        """Refused: see the error."""
        self._refuse_batch("keep some of the sequences")

    def _refuse_batch(self, what: str) -> None:
        raise ValueError(
            f"a static cache cannot {what}: its number of sequences is fixed; use TurboQuantCache, or fill a new cache"
        )

    def offload(self) -> None:
        """Refused: see the error."""
        raise ValueError("a static cache cannot be offloaded: compiled graphs know where its pages are")

    def prefetch(self) -> None:
        """Nothing: pages stay where they are."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = super().__deepcopy__(memo)
        if copied.store is not None:
            self._fix(*copied.store.tensors, copied.store.block_table)
        return copied
