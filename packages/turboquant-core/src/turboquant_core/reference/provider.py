"""The reference as a kernel provider."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ..codec import CacheCodec, Codec
from ..layout import LAYOUT_VERSION
from ..provider import Attended, Gathered, KernelRequest, Packed
from . import attend as attention
from . import pages as page_ops
from . import vectors

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class ReferenceProvider:
    """All six operations in PyTorch. See :class:`turboquant_core.KernelProvider` for shapes and meaning."""

    name: ClassVar[str] = "reference"
    priority: ClassVar[int] = 0

    def unsupported_reason(self, request: KernelRequest) -> str | None:
        """Refuses other layout versions and non-float dtypes; everything else works."""
        if request.layout.version != LAYOUT_VERSION:
            return f"layout version {request.layout.version}, this provider implements {LAYOUT_VERSION}"
        if request.dtype not in _DTYPES:
            return f"dtype is {request.dtype}, needs one of {', '.join(map(str, _DTYPES))}"
        return None

    def encode(self, x: Tensor, codec: Codec) -> Packed:
        """See :meth:`KernelProvider.encode`."""
        return vectors.encode(x, codec)

    def decode(self, packed: Packed, codec: Codec, dtype: torch.dtype = torch.float32) -> Tensor:
        """See :meth:`KernelProvider.decode`."""
        return vectors.decode(packed, codec, dtype)

    def scores(self, query: Tensor, packed: Packed, codec: Codec, *, scaling: float) -> Tensor:
        """See :meth:`KernelProvider.scores`."""
        return vectors.scores(query, packed, codec, scaling)

    def store(self, key: Tensor, value: Tensor, pages: Tensor, slot_mapping: Tensor, codec: CacheCodec) -> None:
        """See :meth:`KernelProvider.store`."""
        page_ops.store(key, value, pages, slot_mapping, codec)

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
        """See :meth:`KernelProvider.attend`; needs no workspace."""
        options = attention.ScoreOptions(scaling, window, softcap, sinks)
        return attention.attend(query, pages, block_table, seq_lens, codec, options, query_start_loc, seq_starts, out)

    def workspace_bytes(self, request: KernelRequest, tokens: int, batch: int) -> int:
        """Zero: the reference allocates as it goes."""
        return 0

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
        return page_ops.gather(pages, block_table, codec, start=start, stop=stop, dtype=dtype, rotated=rotated)
