"""A standalone packed KV cache: append keys and values in any chunks, read back, attend, memory figures."""

from __future__ import annotations

import torch
from torch import Tensor

from .codec import CacheCodec
from .dense import scaling_of
from .layout import PageLayout, VectorLayout, bits_pair
from .packed_sequences import MemoryFigures, PackedSequences
from .provider import Attended, Gathered, KernelRequest
from .selection import select_provider
from .windows import WindowedSequences, Windows


class TurboQuantKVCache:
    """Packed keys and values of one layer for a batch of sequences of equal length.

    Args:
        batch: sequences.
        kv_heads: KV heads.
        head_dim: coordinates of a key and of a value.
        bits: 2, 2.5, 3, 3.5 or 4, or a pair (keys, values).
        seed: rotation seed.
        page_size: tokens of a page, a multiple of 16.
        dtype: dtype of keys and values handed in and back.
        device: where the pages live.
        provider: kernel provider by name; None selects one.
        sink_tokens: first tokens that stay in full precision.
        recent_tokens: last tokens that stay in full precision; a token is packed when it leaves this window.

    Raises:
        LayoutError: ``head_dim``, ``bits`` or ``page_size`` is outside the format.
        ProviderError: the named provider is missing or cannot do this.
        ValueError: ``batch`` is no positive integer, ``dtype`` no dtype of torch, or a number of tokens is negative.
    """

    def __init__(
        self,
        batch: int,
        kv_heads: int,
        head_dim: int,
        bits: float | tuple[float, float] = 4,
        *,
        seed: int = 42,
        page_size: int = 16,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        provider: str | None = None,
        sink_tokens: int = 0,
        recent_tokens: int = 0,
    ) -> None:
        key_bits, value_bits = bits_pair(bits)
        layout = PageLayout(
            key=VectorLayout(head_dim, key_bits, "int8"),
            value=VectorLayout(head_dim, value_bits, "cubic"),
            page_size=page_size,
            kv_heads=kv_heads,
        )
        codec = CacheCodec.create(layout, seed=seed, device=device)
        request = KernelRequest(layout=layout, device=torch.device(device), dtype=dtype)
        packed = PackedSequences(batch, codec, select_provider(request, provider), dtype)
        self._sequences = WindowedSequences(packed, Windows(sink_tokens, recent_tokens))

    @property
    def layout(self) -> PageLayout:
        """The page layout."""
        return self._sequences.layout

    @property
    def codec(self) -> CacheCodec:
        """The codecs of keys and values."""
        return self._sequences.packed.codec

    @property
    def provider_name(self) -> str:
        """Kernel provider in use."""
        return self._sequences.packed.provider.name

    @property
    def seq_length(self) -> int:
        """Tokens of each sequence."""
        return self._sequences.length

    def __len__(self) -> int:
        return self.seq_length

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Pack and add tokens to every sequence: see :meth:`PackedSequences.append`."""
        self._sequences.append(keys, values)

    def read(self, start: int = 0, stop: int | None = None) -> Gathered:
        """Decoded keys and values ``[batch, kv_heads, stop - start, head_dim]`` of the cache's dtype.

        Raises:
            ValueError: the range leaves the cache.
        """
        stop = self.seq_length if stop is None else stop
        return self._sequences.past().read(start, stop, self._sequences.packed.dtype)

    def attend(self, query: Tensor, *, scaling: float | None = None) -> Attended:
        """Causal attention of the last ``q_len`` positions: see :meth:`PackedPast.attend`.

        ``scaling=None`` stands for ``head_dim ** -0.5``.
        """
        return self._sequences.past().attend(query, scaling=scaling_of(query, scaling))

    def memory(self) -> MemoryFigures:
        """True bytes of the cache, scales included."""
        return self._sequences.memory()

    def reset(self) -> None:
        """Forget every token and free the pages."""
        self._sequences.reset()
