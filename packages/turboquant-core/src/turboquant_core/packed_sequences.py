"""Packed keys and values of one layer for a batch of sequences of equal length, in pages that grow in place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .arguments import check_tensors
from .codec import CacheCodec
from .integers import integer
from .layout import PageLayout
from .page_steps import NO_STEPS, PageSteps
from .provider import Attended, Gathered, KernelProvider
from .slots import slots_at

_GROWTH = 8
"""New room is at least one part in this of what is there: appending one by one copies O(n) bytes in all."""


@dataclass(frozen=True, slots=True)
class MemoryFigures:
    """Bytes of a cache.

    Attributes:
        stored: bytes of the tokens held (codes and scales).
        allocated: bytes of all pages, empty slots included.
        uncompressed: bytes that the same tokens take in the dtype they came in.
    """

    stored: int
    allocated: int
    uncompressed: int

    @property
    def compression_ratio(self) -> float:
        """``uncompressed / stored``; 1.0 for an empty cache."""
        return self.uncompressed / self.stored if self.stored else 1.0

    def __add__(self, other: MemoryFigures) -> MemoryFigures:
        return MemoryFigures(
            self.stored + other.stored, self.allocated + other.allocated, self.uncompressed + other.uncompressed
        )


def token_major(x: Tensor) -> Tensor:
    """``[batch, heads, tokens, head_dim]`` to ``[batch * tokens, heads, head_dim]``."""
    # The same strides, in half the operations: the host's time of a decode step.
    return x.squeeze(2) if x.shape[2] == 1 else x.transpose(1, 2).flatten(0, 1)


def check_appended(keys: Tensor, values: Tensor, batch: int, layout: PageLayout) -> None:
    """Raise ``ValueError`` unless both are tokens of ``batch`` sequences that ``layout`` has room for."""
    _check_appended(keys, "keys", batch, layout.kv_heads, layout.key.head_dim)
    _check_appended(values, "values", batch, layout.kv_heads, layout.value.head_dim)
    if keys.shape[2] != values.shape[2]:
        raise ValueError(f"keys are {tuple(keys.shape)} but values {tuple(values.shape)}; tokens must be equal")


def _check_appended(tensor: Tensor, name: str, batch: int, kv_heads: int, head_dim: int) -> None:
    check_tensors(**{name: tensor})
    shape = tensor.shape
    if len(shape) != 4 or shape[0] != batch or shape[1] != kv_heads or shape[3] != head_dim:
        raise ValueError(f"{name} have shape {tuple(shape)}; they must be {(batch, kv_heads, 'tokens', head_dim)}")
    if not tensor.is_floating_point():
        raise ValueError(f"{name} are {tensor.dtype}; they must be floating-point")


@dataclass(frozen=True, slots=True)
class PackedPast:
    """What the pages hold at one moment; later appends and growth do not change it, a crop with an append does.

    Attributes:
        pages: uint8 ``codec.layout.pages_shape(num_pages)``.
        block_table: int32 ``[batch, max_pages]``.
        length: tokens of each sequence.
        codec: the layer's codecs.
        provider: who computes.
        seq_lens: int32 ``[batch]``, ``length`` each, where it is at hand.
    """

    pages: Tensor
    block_table: Tensor
    length: int
    codec: CacheCodec
    provider: KernelProvider
    seq_lens: Tensor | None = None

    def read(self, start: int, stop: int, dtype: torch.dtype) -> Gathered:
        """Decoded keys and values ``[batch, kv_heads, stop - start, head_dim]``.

        Raises:
            ValueError: the range leaves the cache.
        """
        if not 0 <= start <= stop <= self.length:
            raise ValueError(f"range {start}..{stop} leaves the cache, which holds {self.length} tokens")
        return self.provider.gather(self.pages, self.block_table, self.codec, start=start, stop=stop, dtype=dtype)

    def attend(
        self,
        query: Tensor,
        *,
        scaling: float,
        end: int | Tensor | None = None,
        seq_starts: Tensor | None = None,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Attended:
        """Causal attention of the last ``q_len`` positions over everything stored.

        Args:
            query: ``[batch, q_heads, q_len, head_dim]``; ``q_heads`` a multiple of ``kv_heads``.
            end: keys that are stored, as a number or an integer scalar on the device; None for ``length``.
            scaling: multiplier of Q K^T.
            seq_starts: int32 ``[batch]``, first visible position; None for 0.
            window: see :meth:`KernelProvider.attend`.
            softcap: see :meth:`KernelProvider.attend`.
            sinks: float ``[q_heads]``, see :meth:`KernelProvider.attend`.

        Returns:
            out ``[batch, q_heads, q_len, value_head_dim]`` and lse float32 ``[batch, q_heads, q_len]``.

        Raises:
            ValueError: wrong shape, or more queries than tokens stored.
        """
        self.check_query(query, self.length)
        return self._attend(
            query,
            self.block_table,
            self._lengths(end),
            scaling=scaling,
            seq_starts=seq_starts,
            window=window,
            softcap=softcap,
            sinks=sinks,
        )

    def attend_rows(
        self, query: Tensor, seq_lens: Tensor, seq_starts: Tensor, *, scaling: float, softcap: float | None = None
    ) -> Attended:
        """Attention of each query over a range of its own; reads a sequence once for each of its queries.

        Args:
            query: ``[batch, q_heads, q_len, head_dim]``.
            seq_lens: int32 ``[batch * q_len]``, keys from the first on that each query may see, at most ``length``.
            seq_starts: int32 ``[batch * q_len]``, first visible position of each query.
            scaling: multiplier of Q K^T.
            softcap: see :meth:`KernelProvider.attend`.

        Returns:
            As :meth:`attend`.
        """
        rows = self.block_table.repeat_interleave(query.shape[2], dim=0)
        return self._attend(query, rows, seq_lens, scaling=scaling, seq_starts=seq_starts, softcap=softcap)

    def _lengths(self, end: int | Tensor | None) -> Tensor:
        if self.seq_lens is not None and (end is None or (isinstance(end, int) and end == self.length)):
            return self.seq_lens
        end = self.length if end is None else end
        batch = self.block_table.shape[0]
        if isinstance(end, Tensor):
            return end.to(torch.int32).expand(batch).contiguous()
        return torch.full((batch,), end, dtype=torch.int32, device=self.block_table.device)

    def _attend(self, query: Tensor, block_table: Tensor, seq_lens: Tensor, **options: Any) -> Attended:
        batch, q_heads, q_len, _ = query.shape
        flat, lse = self.provider.attend(token_major(query), self.pages, block_table, seq_lens, self.codec, **options)
        if q_len == 1:
            return Attended(flat.unsqueeze(2), lse.unsqueeze(2))
        out = flat.view(batch, q_len, q_heads, self.codec.layout.value.head_dim).transpose(1, 2)
        return Attended(out, lse.view(batch, q_len, q_heads).transpose(1, 2))

    def check_query(self, query: Tensor, length: int) -> None:
        """Raise ``ValueError`` unless ``query`` is of this batch and of at most ``length`` tokens."""
        batch = self.block_table.shape[0]
        if query.dim() != 4 or query.shape[0] != batch or query.shape[2] > length:
            raise ValueError(
                f"query has shape {tuple(query.shape)}; the cache has batch {batch} and {length} tokens: "
                f"append theirs first, and pass [{batch}, q_heads, at most {length}, head_dim]"
            )


class PackedSequences:
    """Pages of one layer, appended to, cropped and reindexed.

    Page ``p`` of sequence ``b`` is page ``p * batch + b`` of the pool, so that growth leaves old pages in place.

    Args:
        batch: sequences.
        codec: codecs of the layer, on the device of the pages.
        provider: who packs and attends.
        dtype: of keys and values handed in.

    Raises:
        ValueError: ``batch`` is no positive integer.
    """

    def __init__(self, batch: int, codec: CacheCodec, provider: KernelProvider, dtype: torch.dtype) -> None:
        batch = integer(batch, "batch", least=1)
        self.codec = codec
        self.provider = provider
        self.dtype = dtype
        self.length = 0
        self._pages = torch.zeros(self.layout.pages_shape(0), dtype=torch.uint8, device=codec.key.device)
        self._block_table = self._table(batch, 0)
        self._steps = NO_STEPS

    @property
    def layout(self) -> PageLayout:
        """The page layout."""
        return self.codec.layout

    @property
    def device(self) -> torch.device:
        """Where the pages are."""
        return self._pages.device

    @property
    def batch(self) -> int:
        """Sequences."""
        return self._block_table.shape[0]

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Pack and add tokens to every sequence.

        Args:
            keys: float ``[batch, kv_heads, tokens, head_dim]``; any number of tokens, 0 included.
            values: float ``[batch, kv_heads, tokens, value_head_dim]``.

        Raises:
            ValueError: wrong shape or dtype; nothing is added then.
        """
        self.check(keys, values)
        self.add(keys, values)

    def add(self, keys: Tensor, values: Tensor) -> None:
        """As :meth:`append`, of tensors that :meth:`check` has seen, or parts of them."""
        self.add_rows(token_major(keys), token_major(values), keys.shape[2])

    def add_rows(self, keys: Tensor, values: Tensor, tokens: int) -> None:
        """As :meth:`add`, of vectors ``[batch * tokens, kv_heads, d]``, the tokens of each sequence together."""
        stop = self.length + tokens
        self._reserve(stop)
        slots = self._step_slots() if tokens == 1 else self._slots(stop)
        self.provider.store(keys, values, self._pages, slots, self.codec)
        self.length = stop

    def past(self) -> PackedPast:
        """What is held now."""
        return PackedPast(self._pages, self._block_table, self.length, self.codec, self.provider, self._seq_lens())

    def crop(self, length: int) -> None:
        """Keep the first ``length`` tokens of every sequence.

        Raises:
            ValueError: ``length`` is negative or more than is held.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot crop to {length} tokens: the cache holds {self.length}")
        self.length = length

    def select(self, indices: Tensor) -> None:
        """Make sequence ``i`` a copy of the former sequence ``indices[i]`` (beams, repeats, subsets); int ``[n]``."""
        capacity = self._block_table.shape[1]
        pool = self._pages.view(capacity, self.batch, *self._pages.shape[1:])
        self._pages = pool.index_select(1, indices.to(self.device)).flatten(0, 1)
        self._block_table = self._table(len(indices), capacity)
        self._steps = NO_STEPS

    def memory(self) -> MemoryFigures:
        """True bytes, scales included."""
        vectors = self.batch * self.layout.kv_heads * self.length
        head_dims = self.layout.key.head_dim + self.layout.value.head_dim
        return MemoryFigures(
            stored=vectors * self.layout.token_bytes,
            allocated=self._pages.nbytes,
            uncompressed=vectors * head_dims * self.dtype.itemsize,
        )

    def reset(self) -> None:
        """Forget every token and free the pages."""
        self.length = 0
        self._pages = self._pages.new_zeros(self.layout.pages_shape(0))
        self._block_table = self._table(self.batch, 0)

    def move(self, device: torch.device | str) -> None:
        """Move the pages; nothing but another move works while they are not where the codec is."""
        self._pages = self._pages.to(device)
        self._block_table = self._block_table.to(device)
        self._steps = NO_STEPS

    def drop(self, pages: int) -> None:
        """Forget the first ``pages`` full pages of every sequence: later tokens move to the front.

        Raises:
            ValueError: not that many pages are full.
        """
        if not 0 <= pages <= self.length // self.layout.page_size:
            raise ValueError(
                f"cannot drop {pages} pages: {self.length} tokens fill {self.length // self.layout.page_size}"
            )
        self._pages = self._pages[pages * self.batch :].clone()
        self._block_table = self._table(self.batch, self._block_table.shape[1] - pages)
        self.length -= pages * self.layout.page_size

    def export(self) -> Tensor:
        """Pages in use, uint8 ``[pages, batch, kv_heads, chunk_bytes]``."""
        used = self.layout.pages_for(self.length)
        return self._pages[: used * self.batch].view(used, self.batch, *self._pages.shape[1:])

    def adopt(self, pages: Tensor, length: int) -> None:
        """Take over what :meth:`export` gave, on the device of the codec.

        Raises:
            ValueError: ``pages`` has not the shape that ``length`` tokens of this store need.
        """
        expected = (self.layout.pages_for(length), self.batch, *self.layout.pages_shape(0)[1:])
        if tuple(pages.shape) != expected or pages.dtype != torch.uint8:
            raise ValueError(f"pages are {pages.dtype} {tuple(pages.shape)}; {length} tokens need uint8 {expected}")
        self._pages = pages.flatten(0, 1).to(self.codec.key.device, copy=True)
        self._block_table = self._table(self.batch, expected[0])
        self.length = length

    def __getstate__(self) -> dict[str, Any]:
        # A copy makes its own when it steps.
        return {**vars(self), "_steps": NO_STEPS}

    def check(self, keys: Tensor, values: Tensor) -> None:
        """Raise ``ValueError`` unless both may be appended."""
        check_appended(keys, values, self.batch, self.layout)

    def _reserve(self, tokens: int) -> None:
        capacity = self._block_table.shape[1]
        need = self.layout.pages_for(tokens)
        if need <= capacity:
            return
        grown = max(need, capacity + -(-capacity // _GROWTH))
        more = self._pages.new_zeros(self.layout.pages_shape((grown - capacity) * self.batch))
        self._pages = torch.cat((self._pages, more))
        self._block_table = self._table(self.batch, grown)

    def _table(self, batch: int, capacity: int) -> Tensor:
        pages = torch.arange(capacity, dtype=torch.int32, device=self.device) * batch
        return pages + torch.arange(batch, dtype=torch.int32, device=self.device).unsqueeze(1)

    def _slots(self, stop: int) -> Tensor:
        position = torch.arange(self.length, stop, device=self.device)
        return slots_at(self._block_table, position, self.layout.page_size).flatten()

    def _step_slots(self) -> Tensor:
        page, offset = divmod(self.length, self.layout.page_size)
        if self._steps.page != page:
            self._steps = PageSteps.of(page, self.batch, self.layout.page_size, self.device)
        return self._steps.slots[offset]

    def _seq_lens(self) -> Tensor | None:
        """Of what is held, if a step has made them."""
        page, offset = divmod(self.length - 1, self.layout.page_size)
        return self._steps.seq_lens[offset] if self.length and self._steps.page == page else None
