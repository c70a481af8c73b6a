"""The reference as a kernel provider."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ..codec import CacheCodec, Codec
from ..exact import exact_rows_reason
from ..layout import LAYOUT_VERSION, PageLayout
from ..operators import Operators
from ..provider import Attended, Gathered, KernelProvider, KernelRequest, Packed
from . import attend as attention
from . import exact, vectors
from . import pages as page_ops

# Lengths and tables are read by the host, which a CUDA graph cannot record. Torch before 2.9 has no such tag.
_TAGS = [tag for tag in [getattr(torch.Tag, "cudagraph_unsafe", None)] if tag is not None]
_PROVIDERS: dict[str, KernelProvider] = {}
# Not that of a subclass: an operator computes what the method of this class does.
_NAME = "reference"
_OPERATORS = Operators("turboquant_reference", _PROVIDERS, _TAGS)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class ReferenceProvider:
    """All six operations in PyTorch. See :class:`turboquant_core.KernelProvider` for shapes and meaning.

    Under ``torch.compile`` they are the custom operators ``torch.ops.turboquant_reference``.
    """

    name: ClassVar[str] = _NAME
    priority: ClassVar[int] = 0

    def unsupported_reason(self, request: KernelRequest) -> str | None:
        """Refuses other layout versions, non-float dtypes and exact rows of another size; all else works."""
        if request.layout.version != LAYOUT_VERSION:
            return f"layout version {request.layout.version}, this provider implements {LAYOUT_VERSION}"
        if request.dtype not in _DTYPES:
            return f"dtype is {request.dtype}, needs one of {', '.join(map(str, _DTYPES))}"
        return exact_rows_reason(request)

    def encode(self, x: Tensor, codec: Codec) -> Packed:
        """See :meth:`KernelProvider.encode`."""
        if torch.compiler.is_compiling():
            return _OPERATORS.encode(_NAME, x, codec)
        return vectors.encode(x, codec)

    def decode(self, packed: Packed, codec: Codec, dtype: torch.dtype = torch.float32) -> Tensor:
        """See :meth:`KernelProvider.decode`."""
        if torch.compiler.is_compiling():
            return _OPERATORS.decode(_NAME, packed, codec, dtype)
        return vectors.decode(packed, codec, dtype)

    def scores(self, query: Tensor, packed: Packed, codec: Codec, *, scaling: float) -> Tensor:
        """See :meth:`KernelProvider.scores`."""
        if torch.compiler.is_compiling():
            return _OPERATORS.scores(_NAME, query, packed, codec, scaling=scaling)
        return vectors.scores(query, packed, codec, scaling)

    def store(self, key: Tensor, value: Tensor, pages: Tensor, slot_mapping: Tensor, codec: CacheCodec) -> None:
        """See :meth:`KernelProvider.store`."""
        if torch.compiler.is_compiling():
            _OPERATORS.store(_NAME, key, value, pages, slot_mapping, codec)
            return
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
        if torch.compiler.is_compiling():
            return _OPERATORS.attend(
                _NAME,
                query,
                pages,
                block_table,
                seq_lens,
                codec,
                scaling=scaling,
                query_start_loc=query_start_loc,
                seq_starts=seq_starts,
                window=window,
                softcap=softcap,
                sinks=sinks,
                out=out,
                workspace=workspace,
            )
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
        if torch.compiler.is_compiling():
            return _OPERATORS.gather(
                _NAME, pages, block_table, codec, start=start, stop=stop, dtype=dtype, rotated=rotated
            )
        return page_ops.gather(pages, block_table, codec, start=start, stop=stop, dtype=dtype, rotated=rotated)

    def store_exact(self, key: Tensor, value: Tensor, pages: Tensor, slot_mapping: Tensor, layout: PageLayout) -> None:
        """See :meth:`turboquant_core.exact.ExactRowsProvider.store_exact`."""
        exact.store_exact(key, value, pages, slot_mapping, layout)

    def attend_between(
        self,
        query: Tensor,
        pages: Tensor,
        block_table: Tensor,
        seq_lens: Tensor,
        codec: CacheCodec,
        *,
        skip_first: int,
        skip_last: int,
        scaling: float,
        query_start_loc: Tensor | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        out: Tensor | None = None,
        workspace: Tensor | None = None,
    ) -> Attended:
        """See :meth:`turboquant_core.exact.ExactRowsProvider.attend_between`.

        Of sequences ``skip_last`` shorter: their causal mask ends so much before each query.
        """
        return self.attend(
            query,
            pages,
            block_table,
            (seq_lens - skip_last).clamp_(min=0),
            codec,
            scaling=scaling,
            query_start_loc=query_start_loc,
            seq_starts=torch.full_like(seq_lens, skip_first),
            softcap=softcap,
            sinks=sinks,
            out=out,
            workspace=workspace,
        )

    def attend_exact(
        self,
        query: Tensor,
        pages: Tensor,
        block_table: Tensor,
        seq_lens: Tensor,
        codec: CacheCodec,
        packed: Attended,
        *,
        recent: int,
        scaling: float,
        query_start_loc: Tensor | None = None,
        softcap: float | None = None,
    ) -> Attended:
        """See :meth:`turboquant_core.exact.ExactRowsProvider.attend_exact`."""
        return exact.attend_exact(
            query,
            pages,
            block_table,
            seq_lens,
            codec,
            packed,
            recent=recent,
            scaling=scaling,
            query_start_loc=query_start_loc,
            softcap=softcap,
        )


_PROVIDERS[_NAME] = ReferenceProvider()
