"""A kernel provider that loses nothing: every code row is a reference to the vector that was stored.

The whole integration runs over real pages, so that what differs from the stock cache is its fault and not a codec's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

from turboquant_core import Attended, CacheCodec, Codec, Gathered, KernelRequest, Packed, ReferenceProvider, selection
from turboquant_core.dense import attend_dense
from turboquant_core.reference.pages import field_views
from turboquant_core.rotation import rotate

NAME = "identity"
REFERENCE_BYTES = 4


class IdentityProvider(ReferenceProvider):
    """Keeps vectors beside the pages; pages hold int32 row numbers, so that bytes may be copied and reordered."""

    name = NAME

    def __init__(self) -> None:
        self._rows: dict[int, Tensor] = {}

    def unsupported_reason(self, request: KernelRequest) -> str | None:
        """Code rows need room for a reference."""
        smallest = min(request.layout.key.code_bytes, request.layout.value.code_bytes)
        return f"a code row of {smallest} bytes" if smallest < REFERENCE_BYTES else None

    def encode(self, x: Tensor, codec: Codec) -> Packed:
        """Keep ``x`` and refer to it."""
        head_dim = codec.layout.head_dim
        kept = self._rows.get(head_dim, x.new_empty(0, head_dim))
        vectors = x.detach().reshape(-1, head_dim)
        first = kept.shape[0]
        self._rows[head_dim] = torch.cat((kept, vectors))
        numbers = torch.arange(first, first + vectors.shape[0], dtype=torch.int32)
        codes = torch.zeros(vectors.shape[0], codec.layout.code_bytes, dtype=torch.uint8)
        codes[:, :REFERENCE_BYTES] = numbers.view(-1, 1).view(torch.uint8)
        return Packed(codes.view(*x.shape[:-1], -1), torch.ones(x.shape[:-1], dtype=torch.float16))

    def decode(self, packed: Packed, codec: Codec, dtype: torch.dtype = torch.float32) -> Tensor:
        """What was kept."""
        numbers = packed.codes[..., :REFERENCE_BYTES].contiguous().view(torch.int32).squeeze(-1).long()
        return self._rows[codec.layout.head_dim][numbers].to(dtype)

    def store(self, key: Tensor, value: Tensor, pages: Tensor, slot_mapping: Tensor, codec: CacheCodec) -> None:
        """See :meth:`KernelProvider.store`."""
        page, offset = slot_mapping // codec.layout.page_size, slot_mapping % codec.layout.page_size
        for vectors, fields, own in zip((key, value), field_views(pages, codec.layout), _codecs(codec), strict=True):
            fields.codes[page, :, offset] = self.encode(vectors, own).codes

    def gather(
        self,
        pages: Tensor,
        block_table: Tensor,
        codec: CacheCodec,
        *,
        start: int,
        stop: int,
        dtype: torch.dtype,
        rotated: bool = False,
    ) -> Gathered:
        """See :meth:`KernelProvider.gather`."""
        position = torch.arange(start, stop)
        page = block_table[:, position // codec.layout.page_size].long()
        offset = (position % codec.layout.page_size).expand_as(page)
        found = []
        for fields, own in zip(field_views(pages, codec.layout), _codecs(codec), strict=True):
            vectors = self.decode(Packed(fields.codes[page, :, offset], fields.scales), own).transpose(1, 2)
            found.append((rotate(vectors, own.signs) if rotated else vectors).to(dtype))
        return Gathered(*found)

    def attend(
        self,
        query: Tensor,
        pages: Tensor,
        block_table: Tensor,
        seq_lens: Tensor,
        codec: CacheCodec,
        *,
        scaling: float,
        query_start_loc: Tensor | None = None,
        seq_starts: Tensor | None = None,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        out: Tensor | None = None,
        workspace: Tensor | None = None,
    ) -> Attended:
        """See :meth:`KernelProvider.attend`; every sequence has equally many queries."""
        assert query_start_loc is None
        batch, length = seq_lens.shape[0], int(seq_lens.max())
        keys, values = self.gather(pages, block_table, codec, start=0, stop=length, dtype=torch.float32)
        stacked = query.unflatten(0, (batch, -1)).transpose(1, 2)
        starts = torch.zeros_like(seq_lens) if seq_starts is None else seq_starts
        visible = _visible(stacked.shape[2], seq_lens, starts, length, window)
        result = attend_dense(stacked, keys, values, visible, scaling=scaling, softcap=softcap, sinks=sinks)
        flat, lse = result.out.transpose(1, 2).flatten(0, 1).to(query.dtype), result.lse.transpose(1, 2).flatten(0, 1)
        return Attended(flat if out is None else out.copy_(flat), lse)


def _codecs(codec: CacheCodec) -> tuple[Codec, Codec]:
    assert codec.value is not None, "the sweep packs values as well"
    return codec.key, codec.value


def _visible(q_len: int, seq_lens: Tensor, starts: Tensor, length: int, window: int | None) -> Tensor:
    """Bool ``[batch, q_len, length]``."""
    key = torch.arange(length)
    query = seq_lens.view(-1, 1, 1) - q_len + torch.arange(q_len).view(-1, 1)
    visible = (key <= query) & (key >= starts.view(-1, 1, 1))
    return visible if window is None else visible & (key > query - window)


@contextmanager
def identity_provider(provider_class: type[IdentityProvider] = IdentityProvider) -> Iterator[str]:
    """Within the block, caches find the provider by the name that is given."""
    load = selection.load_provider

    def also_identity(name: str) -> object:
        return provider_class() if name == NAME else load(name)

    with mock.patch.object(selection, "load_provider", also_identity):
        yield NAME
