"""A key-value cache in packed pages that needs nothing but PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .codec import CacheCodec
from .layout import PageLayout, VectorLayout
from .provider import Attended, Gathered, KernelProvider, KernelRequest
from .selection import select_provider


@dataclass(frozen=True, slots=True)
class MemoryFigures:
    """Bytes of a cache.

    Attributes:
        stored: bytes of the tokens held (codes and scales).
        allocated: bytes of all pages, empty slots included.
        uncompressed: bytes that the same tokens take in ``dtype``.
    """

    stored: int
    allocated: int
    uncompressed: int

    @property
    def compression_ratio(self) -> float:
        """``uncompressed / stored``; 1.0 for an empty cache."""
        return self.uncompressed / self.stored if self.stored else 1.0


class TurboQuantKVCache:
    """Packed keys and values of one layer for a batch of sequences of equal length.

    Args:
        batch: sequences.
        kv_heads: KV heads.
        head_dim: coordinates of a key and of a value.
        bits: 2, 3 or 4, or a pair (keys, values).
        seed: rotation seed.
        page_size: tokens of a page, a multiple of 16.
        dtype: dtype of keys and values handed in and back.
        device: where the pages live.
        provider: kernel provider by name; None selects one.

    Raises:
        LayoutError: ``head_dim``, ``bits`` or ``page_size`` is outside the format.
        ProviderError: the named provider is missing or cannot do this.
    """

    def __init__(
        self,
        batch: int,
        kv_heads: int,
        head_dim: int,
        bits: int | tuple[int, int] = 4,
        *,
        seed: int = 42,
        page_size: int = 16,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        provider: str | None = None,
    ) -> None:
        key_bits, value_bits = bits if isinstance(bits, tuple) else (bits, bits)
        layout = PageLayout(
            key=VectorLayout(head_dim, key_bits, "int8"),
            value=VectorLayout(head_dim, value_bits, "cubic"),
            page_size=page_size,
            kv_heads=kv_heads,
        )
        if batch < 1:
            raise ValueError(f"batch is {batch}; it must be at least 1")
        self.codec = CacheCodec.create(layout, seed=seed, device=device)
        self.dtype = dtype
        self.batch = batch
        request = KernelRequest(layout=layout, device=torch.device(device), dtype=dtype)
        self._provider: KernelProvider = select_provider(request, provider)
        self._length = 0
        self._pages = torch.zeros(layout.pages_shape(0), dtype=torch.uint8, device=device)

    @property
    def layout(self) -> PageLayout:
        """The page layout."""
        return self.codec.layout

    @property
    def provider_name(self) -> str:
        """Kernel provider in use."""
        return self._provider.name

    @property
    def seq_length(self) -> int:
        """Tokens of each sequence."""
        return self._length

    def __len__(self) -> int:
        return self._length

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Pack and add tokens to every sequence.

        Args:
            keys: float ``[batch, kv_heads, tokens, head_dim]``; any number of tokens, 0 included.
            values: the same shape.

        Raises:
            ValueError: wrong shape or dtype; nothing is added then.
        """
        self._check(keys, "keys")
        self._check(values, "values")
        if keys.shape != values.shape:
            raise ValueError(f"keys are {tuple(keys.shape)} but values {tuple(values.shape)}; shapes must be equal")
        tokens = keys.shape[2]
        self._reserve(self._length + tokens)
        slots = self._slots(self._length, self._length + tokens)
        self._provider.store(_token_major(keys), _token_major(values), self._pages, slots, self.codec)
        self._length += tokens

    def read(self, start: int = 0, stop: int | None = None) -> Gathered:
        """Decoded keys and values ``[batch, kv_heads, stop - start, head_dim]`` of ``dtype``.

        Raises:
            ValueError: the range leaves the cache.
        """
        stop = self._length if stop is None else stop
        if not 0 <= start <= stop <= self._length:
            raise ValueError(f"range {start}..{stop} leaves the cache, which holds {self._length} tokens")
        return self._provider.gather(
            self._pages, self._block_table(), self.codec, start=start, stop=stop, dtype=self.dtype
        )

    def attend(self, query: Tensor, *, scaling: float | None = None) -> Attended:
        """Attention of the last ``q_len`` positions over everything stored.

        Args:
            query: ``[batch, q_heads, q_len, head_dim]``; ``q_heads`` a multiple of ``kv_heads``.
            scaling: multiplier of Q K^T; None for ``head_dim ** -0.5``.

        Returns:
            out ``[batch, q_heads, q_len, head_dim]`` and lse float32 ``[batch, q_heads, q_len]``.

        Raises:
            ValueError: wrong shape, or more queries than tokens stored.
        """
        batch, q_heads, q_len, head_dim = query.shape
        if batch != self.batch or q_len > self._length:
            raise ValueError(
                f"query has shape {tuple(query.shape)}; the cache has batch {self.batch} and {self._length} tokens"
            )
        seq_lens = torch.full((batch,), self._length, dtype=torch.int32, device=query.device)
        flat, lse = self._provider.attend(
            _token_major(query),
            self._pages,
            self._block_table(),
            seq_lens,
            self.codec,
            scaling=head_dim**-0.5 if scaling is None else scaling,
        )
        out = flat.view(batch, q_len, q_heads, -1).transpose(1, 2)
        return Attended(out, lse.view(batch, q_len, q_heads).transpose(1, 2))

    def memory(self) -> MemoryFigures:
        """True bytes of the cache, scales included."""
        vectors = self.batch * self.layout.kv_heads * self._length
        head_dims = self.layout.key.head_dim + self.layout.value.head_dim
        return MemoryFigures(
            stored=vectors * self.layout.token_bytes,
            allocated=self._pages.nbytes,
            uncompressed=vectors * head_dims * self.dtype.itemsize,
        )

    def reset(self) -> None:
        """Forget every token and free the pages."""
        self._length = 0
        self._pages = self._pages.new_zeros(self.layout.pages_shape(0))

    def _check(self, tensor: Tensor, name: str) -> None:
        expected = (self.batch, self.layout.kv_heads, "tokens", self.layout.key.head_dim)
        shape = tuple(tensor.shape)
        if len(shape) != 4 or any(want not in (got, "tokens") for want, got in zip(expected, shape, strict=True)):
            raise ValueError(f"{name} have shape {shape}; they must be {expected}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} are {tensor.dtype}; they must be floating-point")

    def _reserve(self, tokens: int) -> None:
        """Grow to at least double, so that appending n tokens one by one copies O(n) bytes.

        Page ``p`` of sequence ``b`` is page ``p * batch + b`` of the pool, hence growth leaves old pages in place.
        """
        have = self._pages.shape[0] // self.batch
        need = self.layout.pages_for(tokens)
        if need <= have:
            return
        more = self._pages.new_zeros(self.layout.pages_shape((max(need, 2 * have) - have) * self.batch))
        self._pages = torch.cat((self._pages, more))

    def _block_table(self) -> Tensor:
        per_sequence = self._pages.shape[0] // self.batch
        pages = torch.arange(per_sequence, dtype=torch.int32, device=self._pages.device) * self.batch
        return pages + torch.arange(self.batch, dtype=torch.int32, device=self._pages.device).unsqueeze(1)

    def _slots(self, start: int, stop: int) -> Tensor:
        position = torch.arange(start, stop, device=self._pages.device)
        page = self._block_table()[:, position // self.layout.page_size].long()
        return (page * self.layout.page_size + position % self.layout.page_size).flatten()


def _token_major(x: Tensor) -> Tensor:
    """``[batch, heads, tokens, head_dim]`` to ``[batch * tokens, heads, head_dim]``."""
    return x.transpose(1, 2).flatten(0, 1)
