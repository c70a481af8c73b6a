"""The provider that turboquant-core finds by entry point. Kernels are imported when the first one is launched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from turboquant_core import Attended, CacheCodec, Codec, Gathered, KernelRequest, Packed, PageLayout, VectorLayout

from .checks import check_rounding
from .operators import OPERATORS, PROVIDERS, TOKEN_STEP
from .support import permute_supported, unsupported_reason


class TritonProvider:
    """All six operations as fused kernels. See :class:`turboquant_core.KernelProvider` for shapes and meaning.

    ``attend`` has two forms over the same bytes: on NVIDIA GPUs from sm_80 byte-permute instructions and int8 tensor
    cores, for the format's own codebooks (``int8`` keys, ``cubic`` or 16-bit values); elsewhere plain Triton. The first
    quantizes each rotated query to int8 (relative error below 1 % of a score's standard deviation).

    All six, and ``add_tokens``, are custom operators under ``torch.compile``: no graph break, ``fullgraph=True`` works,
    and ``pages``, ``out`` and ``workspace`` are written in place.

    Args:
        portable: never take the byte-permute form.
    """

    name: ClassVar[str] = "triton"
    priority: ClassVar[int] = 100

    def __init__(self, *, portable: bool = False) -> None:
        self._portable = portable
        self._variant = f"{self.name} portable" if portable else self.name
        PROVIDERS[self._variant] = self

    def unsupported_reason(self, request: KernelRequest) -> str | None:
        """See :meth:`KernelProvider.unsupported_reason`.

        On a GPU this runs the self-test of the device once and makes the constants of the layout, so that no later
        call allocates them, in a CUDA graph for one.
        """
        reason = unsupported_reason(request)
        if reason is not None or request.device.type != "cuda":
            return reason
        from .launch import make_constants
        from .self_test import self_test_reason

        make_constants(request.layout, request.device)
        if not self._permutes(request.layout, request.device, request.dtype):
            return None
        vectors = (request.layout.key, request.layout.value)
        return self_test_reason(request.device, any(isinstance(v, VectorLayout) and v.is_mixed for v in vectors))

    def _permutes(self, layout: PageLayout, device: torch.device, dtype: torch.dtype) -> bool:
        return not self._portable and permute_supported(layout, device, dtype)

    def encode(self, x: Tensor, codec: Codec) -> Packed:
        """See :meth:`KernelProvider.encode`."""
        check_rounding(codec)
        if torch.compiler.is_compiling():
            return OPERATORS.encode(self._variant, x, codec)
        from .kernels.encode import encode

        return encode(x, codec)

    def decode(self, packed: Packed, codec: Codec, dtype: torch.dtype = torch.float32) -> Tensor:
        """See :meth:`KernelProvider.decode`."""
        if torch.compiler.is_compiling():
            return OPERATORS.decode(self._variant, packed, codec, dtype)
        from .kernels.decode import decode

        return decode(packed, codec, dtype)

    def scores(self, query: Tensor, packed: Packed, codec: Codec, *, scaling: float) -> Tensor:
        """See :meth:`KernelProvider.scores`."""
        if torch.compiler.is_compiling():
            return OPERATORS.scores(self._variant, query, packed, codec, scaling=scaling)
        from .kernels.scores import scores

        return scores(query, packed, codec, scaling=scaling)

    def store(self, key: Tensor, value: Tensor, pages: Tensor, slot_mapping: Tensor, codec: CacheCodec) -> None:
        """See :meth:`KernelProvider.store`; on a GPU a slot beyond the pages is skipped, not refused."""
        for vectors in (codec.key, codec.value):
            check_rounding(vectors)
        if torch.compiler.is_compiling():
            OPERATORS.store(self._variant, key, value, pages, slot_mapping, codec)
            return
        from .kernels.store import store

        store(key, value, pages, slot_mapping, codec)

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
        """See :meth:`KernelProvider.attend`; fixed grid, no host read: safe in a CUDA graph after a first call."""
        if torch.compiler.is_compiling():
            return OPERATORS.attend(
                self._variant,
                query,
                pages,
                block_table,
                seq_lens,
                codec,
                scaling=scaling,
                window=window,
                softcap=softcap,
                query_start_loc=query_start_loc,
                seq_starts=seq_starts,
                sinks=sinks,
                out=out,
                workspace=workspace,
            )
        from .attend import AttendOptions, attend

        return attend(
            query,
            pages,
            block_table,
            seq_lens,
            codec,
            AttendOptions(scaling, window, softcap),
            query_start_loc=query_start_loc,
            seq_starts=seq_starts,
            sinks=sinks,
            out=out,
            workspace=workspace,
            permute=self._permutes(codec.layout, query.device, query.dtype),
        )

    def workspace_bytes(self, request: KernelRequest, tokens: int, batch: int) -> int:
        """See :meth:`KernelProvider.workspace_bytes`; does not depend on the context."""
        from .attend import attend_workspace_bytes

        permute = self._permutes(request.layout, request.device, request.dtype)
        return attend_workspace_bytes(request, tokens, batch, permute)

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
            return OPERATORS.gather(
                self._variant, pages, block_table, codec, start=start, stop=stop, dtype=dtype, rotated=rotated
            )
        from .kernels.gather import gather

        return gather(pages, block_table, codec, start=start, stop=stop, dtype=dtype, rotated=rotated)

    def store_exact(self, key: Tensor, value: Tensor, pages: Tensor, slot_mapping: Tensor, layout: PageLayout) -> None:
        """See :meth:`turboquant_core.exact.ExactRowsProvider.store_exact`."""
        from .kernels.store_exact import store_exact

        store_exact(key, value, pages, slot_mapping, layout)

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
        """See :meth:`turboquant_core.exact.ExactRowsProvider.attend_between`; as many launches as :meth:`attend`."""
        from .attend import AttendOptions, attend

        return attend(
            query,
            pages,
            block_table,
            seq_lens,
            codec,
            AttendOptions(scaling, None, softcap, skip_first, skip_last),
            query_start_loc=query_start_loc,
            seq_starts=None,
            sinks=sinks,
            out=out,
            workspace=workspace,
            permute=self._permutes(codec.layout, query.device, query.dtype),
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
        """See :meth:`turboquant_core.exact.ExactRowsProvider.attend_exact`; one launch, safe in a CUDA graph."""
        from .kernels.attend_exact import attend_exact

        return attend_exact(
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

    def add_tokens(
        self,
        part: Attended,
        query: Tensor,
        exact: Sequence[Gathered],
        *,
        center: Tensor | None,
        scaling: float,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        visible: Tensor | None = None,
    ) -> Attended:
        """See :meth:`turboquant_core.token_step.TokenStepProvider.add_tokens`; one launch, safe in a CUDA graph."""
        options: dict[str, Any] = {
            "center": center,
            "scaling": scaling,
            "softcap": softcap,
            "sinks": sinks,
            "visible": visible,
        }
        if torch.compiler.is_compiling():
            return TOKEN_STEP.add_tokens(self._variant, part, query, exact, **options)
        from .kernels.add_tokens import add_tokens

        return add_tokens(part, query, exact, **options)
