"""The operations as custom operators, so that ``torch.compile(fullgraph=True)`` works over them.

:class:`turboquant_triton.TritonProvider` calls these while a graph is traced, and the launchers directly otherwise: an
operator's dispatch costs more than the checks of the call. Each operator has a fake implementation, which gives shapes
and dtypes alone; what is written in place is declared in the schema (``pages`` by ``store``, ``out`` and ``workspace``
by ``attend``). Pages, lengths and tables stay ordinary graph inputs: nothing is read by the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from turboquant_core import Attended, CacheCodec, Codec, Gathered, Packed

from .codec_arguments import (
    cache_integers,
    codec_tensors,
    page_layout,
    rebuild_cache_codec,
    rebuild_codec,
    vector_integers,
    vector_layout,
)

_LIBRARY = torch.library.Library("turboquant_triton", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag,)


def _operator(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function as the implementation of ``schema`` on CPU (interpreter) and CUDA."""

    def register(implementation: Callable[..., Any]) -> Callable[..., Any]:
        name = schema.partition("(")[0]
        _LIBRARY.define(schema, tags=_TAGS)
        for device in ("CPU", "CUDA"):
            _LIBRARY.impl(name, implementation, device)
        torch.library.register_fake(f"turboquant_triton::{name}", fake, lib=_LIBRARY)
        operator: Callable[..., Any] = getattr(torch.ops.turboquant_triton, name).default
        return operator

    return register


def _encode_fake(x: Tensor, codec: list[Tensor], layout: list[int]) -> tuple[Tensor, Tensor]:
    codes = x.new_empty((*x.shape[:-1], vector_layout(tuple(layout)).code_bytes), dtype=torch.uint8)
    return codes, x.new_empty(x.shape[:-1], dtype=torch.float16)


@_operator("encode(Tensor x, Tensor[] codec, int[] layout) -> (Tensor, Tensor)", _encode_fake)
def _encode(x: Tensor, codec: list[Tensor], layout: list[int]) -> tuple[Tensor, Tensor]:
    from .kernels.encode import encode as launch

    codes, scales = launch(x, rebuild_codec(codec, layout))
    return codes, scales


def encode(x: Tensor, codec: Codec) -> Packed:
    """See :meth:`turboquant_core.KernelProvider.encode`."""
    return Packed(*_encode(x, codec_tensors(codec), vector_integers(codec)))


def _decode_fake(codes: Tensor, scales: Tensor, codec: list[Tensor], layout: list[int], dtype: torch.dtype) -> Tensor:
    return codes.new_empty((*scales.shape, layout[0]), dtype=dtype)


@_operator(
    "decode(Tensor codes, Tensor scales, Tensor[] codec, int[] layout, ScalarType dtype) -> Tensor", _decode_fake
)
def _decode(codes: Tensor, scales: Tensor, codec: list[Tensor], layout: list[int], dtype: torch.dtype) -> Tensor:
    from .kernels.decode import decode as launch

    return launch(Packed(codes, scales), rebuild_codec(codec, layout), dtype)


def decode(packed: Packed, codec: Codec, dtype: torch.dtype) -> Tensor:
    """See :meth:`turboquant_core.KernelProvider.decode`."""
    result: Tensor = _decode(packed.codes, packed.scales, codec_tensors(codec), vector_integers(codec), dtype)
    return result


def _scores_fake(
    query: Tensor, codes: Tensor, scales: Tensor, codec: list[Tensor], layout: list[int], scaling: float
) -> Tensor:
    lead = torch.broadcast_shapes(query.shape[:-2], codes.shape[:-2])
    return query.new_empty((*lead, query.shape[-2], codes.shape[-2]), dtype=torch.float32)


@_operator(
    "scores(Tensor query, Tensor codes, Tensor scales, Tensor[] codec, int[] layout, float scaling) -> Tensor",
    _scores_fake,
)
def _scores(
    query: Tensor, codes: Tensor, scales: Tensor, codec: list[Tensor], layout: list[int], scaling: float
) -> Tensor:
    from .kernels.scores import scores as launch

    return launch(query, Packed(codes, scales), rebuild_codec(codec, layout), scaling=scaling)


def scores(query: Tensor, packed: Packed, codec: Codec, *, scaling: float) -> Tensor:
    """See :meth:`turboquant_core.KernelProvider.scores`."""
    result: Tensor = _scores(query, packed.codes, packed.scales, codec_tensors(codec), vector_integers(codec), scaling)
    return result


def _store_fake(*arguments: Any) -> None:
    return None


@_operator(
    "store(Tensor key, Tensor value, Tensor(a!) pages, Tensor slot_mapping, Tensor[] key_codec, Tensor[] value_codec, "
    "int[] layout) -> ()",
    _store_fake,
)
def _store(
    key: Tensor,
    value: Tensor,
    pages: Tensor,
    slot_mapping: Tensor,
    key_codec: list[Tensor],
    value_codec: list[Tensor],
    layout: list[int],
) -> None:
    from .kernels.store import store as launch

    launch(key, value, pages, slot_mapping, rebuild_cache_codec(key_codec, value_codec, layout))


def store(key: Tensor, value: Tensor, pages: Tensor, slot_mapping: Tensor, codec: CacheCodec) -> None:
    """See :meth:`turboquant_core.KernelProvider.store`."""
    _store(key, value, pages, slot_mapping, codec_tensors(codec.key), codec_tensors(codec.value), cache_integers(codec))


def _attend_fake(query: Tensor, *arguments: Any) -> Tensor:
    return query.new_empty(query.shape[:2], dtype=torch.float32)


@_operator(
    "attend(Tensor query, Tensor pages, Tensor block_table, Tensor seq_lens, Tensor[] key_codec, Tensor[] value_codec, "
    "int[] layout, float scaling, int? window, float? softcap, Tensor? query_start_loc, Tensor? seq_starts, "
    "Tensor? sinks, Tensor(a!) out, Tensor(b!)? workspace, bool portable) -> Tensor",
    _attend_fake,
)
def _attend(
    query: Tensor,
    pages: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    key_codec: list[Tensor],
    value_codec: list[Tensor],
    layout: list[int],
    scaling: float,
    window: int | None,
    softcap: float | None,
    query_start_loc: Tensor | None,
    seq_starts: Tensor | None,
    sinks: Tensor | None,
    out: Tensor,
    workspace: Tensor | None,
    portable: bool,
) -> Tensor:
    from .attend import AttendOptions
    from .attend import attend as launch
    from .support import permute_supported

    codec = rebuild_cache_codec(key_codec, value_codec, layout)
    return launch(
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
        permute=not portable and permute_supported(codec.layout, query.device, query.dtype),
    ).lse


def attend(
    query: Tensor,
    pages: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    codec: CacheCodec,
    *,
    scaling: float,
    window: int | None,
    softcap: float | None,
    query_start_loc: Tensor | None,
    seq_starts: Tensor | None,
    sinks: Tensor | None,
    out: Tensor | None,
    workspace: Tensor | None,
    portable: bool,
) -> Attended:
    """See :meth:`turboquant_core.KernelProvider.attend`; ``portable`` as in :class:`TritonProvider`."""
    if out is None:
        out = query.new_empty((query.shape[0], query.shape[1], codec.layout.value.head_dim))
    lse = _attend(
        query,
        pages,
        block_table,
        seq_lens,
        codec_tensors(codec.key),
        codec_tensors(codec.value),
        cache_integers(codec),
        scaling,
        window,
        softcap,
        query_start_loc,
        seq_starts,
        sinks,
        out,
        workspace,
        portable,
    )
    return Attended(out, lse)


def _gather_fake(
    pages: Tensor,
    block_table: Tensor,
    key_codec: list[Tensor],
    value_codec: list[Tensor],
    layout: list[int],
    start: int,
    stop: int,
    dtype: torch.dtype,
    rotated: bool,
) -> tuple[Tensor, Tensor]:
    format_ = page_layout(tuple(layout))
    shape = (block_table.shape[0], format_.kv_heads, stop - start)
    keys = pages.new_empty((*shape, format_.key.head_dim), dtype=dtype)
    return keys, pages.new_empty((*shape, format_.value.head_dim), dtype=dtype)


@_operator(
    "gather(Tensor pages, Tensor block_table, Tensor[] key_codec, Tensor[] value_codec, int[] layout, SymInt start, "
    "SymInt stop, ScalarType dtype, bool rotated) -> (Tensor, Tensor)",
    _gather_fake,
)
def _gather(
    pages: Tensor,
    block_table: Tensor,
    key_codec: list[Tensor],
    value_codec: list[Tensor],
    layout: list[int],
    start: int,
    stop: int,
    dtype: torch.dtype,
    rotated: bool,
) -> tuple[Tensor, Tensor]:
    from .kernels.gather import gather as launch

    codec = rebuild_cache_codec(key_codec, value_codec, layout)
    keys, values = launch(pages, block_table, codec, start=start, stop=stop, dtype=dtype, rotated=rotated)
    return keys, values


def gather(
    pages: Tensor, block_table: Tensor, codec: CacheCodec, *, start: int, stop: int, dtype: torch.dtype, rotated: bool
) -> Gathered:
    """See :meth:`turboquant_core.KernelProvider.gather`."""
    return Gathered(
        *_gather(
            pages,
            block_table,
            codec_tensors(codec.key),
            codec_tensors(codec.value),
            cache_integers(codec),
            start,
            stop,
            dtype,
            rotated,
        )
    )
