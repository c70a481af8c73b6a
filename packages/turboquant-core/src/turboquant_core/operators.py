"""A provider's operations as custom operators, so that ``torch.compile(fullgraph=True)`` works over them.

A provider calls these while a graph is traced, and computes directly otherwise: an operator's dispatch costs more than
the checks of the call. Each operator has a fake implementation, which gives shapes and dtypes alone; what is written in
place is declared in the schema (``pages`` by ``store``, ``out`` and ``workspace`` by ``attend``). Pages, lengths and
tables stay ordinary graph inputs: nothing is read by the host.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .codec import CacheCodec, Codec
from .codec_arguments import (
    cache_integers,
    codec_tensors,
    page_layout,
    rebuild_cache_codec,
    rebuild_codec,
    vector_integers,
    vector_layout,
)
from .provider import Attended, Gathered, KernelProvider, Packed

Providers = Mapping[str, KernelProvider]

_CACHE_CODEC = "Tensor[] key_codec, Tensor[] value_codec, int[] layout"
SCHEMAS = {
    "encode": "(Tensor x, Tensor[] codec, int[] layout, str provider) -> (Tensor, Tensor)",
    "decode": "(Tensor codes, Tensor scales, Tensor[] codec, int[] layout, ScalarType dtype, str provider) -> Tensor",
    "scores": (
        "(Tensor query, Tensor codes, Tensor scales, Tensor[] codec, int[] layout, float scaling, str provider) "
        "-> Tensor"
    ),
    "store": f"(Tensor key, Tensor value, Tensor(a!) pages, Tensor slot_mapping, {_CACHE_CODEC}, str provider) -> ()",
    "attend": (
        f"(Tensor query, Tensor pages, Tensor block_table, Tensor seq_lens, {_CACHE_CODEC}, float scaling, "
        "int? window, float? softcap, Tensor? query_start_loc, Tensor? seq_starts, Tensor? sinks, Tensor(a!) out, "
        "Tensor(b!)? workspace, str provider) -> Tensor"
    ),
    "gather": (
        f"(Tensor pages, Tensor block_table, {_CACHE_CODEC}, SymInt start, SymInt stop, ScalarType dtype, "
        "bool rotated, str provider) -> (Tensor, Tensor)"
    ),
}
"""Arguments of each operator; ``provider`` chooses among the providers that share them."""


def _encode(providers: Providers, x: Tensor, codec: list[Tensor], layout: list[int], provider: str) -> Any:
    return tuple(providers[provider].encode(x, rebuild_codec(codec, layout)))


def _encode_fake(x: Tensor, codec: list[Tensor], layout: list[int], provider: str) -> Any:
    codes = x.new_empty((*x.shape[:-1], vector_layout(tuple(layout)).code_bytes), dtype=torch.uint8)
    return codes, x.new_empty(x.shape[:-1], dtype=torch.float16)


def _decode(
    providers: Providers,
    codes: Tensor,
    scales: Tensor,
    codec: list[Tensor],
    layout: list[int],
    dtype: torch.dtype,
    provider: str,
) -> Tensor:
    return providers[provider].decode(Packed(codes, scales), rebuild_codec(codec, layout), dtype)


def _decode_fake(
    codes: Tensor, scales: Tensor, codec: list[Tensor], layout: list[int], dtype: torch.dtype, provider: str
) -> Tensor:
    return codes.new_empty((*scales.shape, layout[0]), dtype=dtype)


def _scores(
    providers: Providers,
    query: Tensor,
    codes: Tensor,
    scales: Tensor,
    codec: list[Tensor],
    layout: list[int],
    scaling: float,
    provider: str,
) -> Tensor:
    return providers[provider].scores(query, Packed(codes, scales), rebuild_codec(codec, layout), scaling=scaling)


def _scores_fake(query: Tensor, codes: Tensor, *arguments: Any) -> Tensor:
    lead = torch.broadcast_shapes(query.shape[:-2], codes.shape[:-2])
    return query.new_empty((*lead, query.shape[-2], codes.shape[-2]), dtype=torch.float32)


def _store(
    providers: Providers,
    key: Tensor,
    value: Tensor,
    pages: Tensor,
    slot_mapping: Tensor,
    key_codec: list[Tensor],
    value_codec: list[Tensor],
    layout: list[int],
    provider: str,
) -> None:
    providers[provider].store(key, value, pages, slot_mapping, rebuild_cache_codec(key_codec, value_codec, layout))


def _store_fake(*arguments: Any) -> None:
    return None


def _attend(
    providers: Providers,
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
    provider: str,
) -> Tensor:
    return (
        providers[provider]
        .attend(
            query,
            pages,
            block_table,
            seq_lens,
            rebuild_cache_codec(key_codec, value_codec, layout),
            scaling=scaling,
            window=window,
            softcap=softcap,
            query_start_loc=query_start_loc,
            seq_starts=seq_starts,
            sinks=sinks,
            out=out,
            workspace=workspace,
        )
        .lse
    )


def _attend_fake(query: Tensor, *arguments: Any) -> Tensor:
    return query.new_empty(query.shape[:2], dtype=torch.float32)


def _gather(
    providers: Providers,
    pages: Tensor,
    block_table: Tensor,
    key_codec: list[Tensor],
    value_codec: list[Tensor],
    layout: list[int],
    start: int,
    stop: int,
    dtype: torch.dtype,
    rotated: bool,
    provider: str,
) -> Any:
    codec = rebuild_cache_codec(key_codec, value_codec, layout)
    read = providers[provider].gather(pages, block_table, codec, start=start, stop=stop, dtype=dtype, rotated=rotated)
    # The strides that the fake implementation promises.
    return tuple(x.contiguous() for x in read)


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
    provider: str,
) -> Any:
    format_ = page_layout(tuple(layout))
    shape = (block_table.shape[0], format_.kv_heads, stop - start)
    keys = pages.new_empty((*shape, format_.key.head_dim), dtype=dtype)
    return keys, pages.new_empty((*shape, format_.value.head_dim), dtype=dtype)


_IMPLEMENTATIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "encode": (_encode, _encode_fake),
    "decode": (_decode, _decode_fake),
    "scores": (_scores, _scores_fake),
    "store": (_store, _store_fake),
    "attend": (_attend, _attend_fake),
    "gather": (_gather, _gather_fake),
}


class Operators:
    """The six operations of :class:`turboquant_core.KernelProvider` as ``torch.ops.<namespace>``.

    Each method has the arguments of the operation after the name of the provider that computes.

    Args:
        namespace: of the operators; can be defined once in a process.
        providers: who computes, by name; must have the name when a graph runs.
        tags: of the operators, for the compiler.
    """

    def __init__(self, namespace: str, providers: Providers, tags: Sequence[torch.Tag] = ()) -> None:
        self._library = torch.library.Library(namespace, "DEF")
        for name, (implementation, fake) in _IMPLEMENTATIONS.items():
            self._library.define(name + SCHEMAS[name], tags=(torch.Tag.pt2_compliant_tag, *tags))
            self._library.impl(name, partial(implementation, providers), "CompositeExplicitAutograd")
            torch.library.register_fake(f"{namespace}::{name}", fake, lib=self._library)
            setattr(self, f"_{name}", getattr(getattr(torch.ops, namespace), name).default)

    _encode: Callable[..., tuple[Tensor, Tensor]]
    _decode: Callable[..., Tensor]
    _scores: Callable[..., Tensor]
    _store: Callable[..., None]
    _attend: Callable[..., Tensor]
    _gather: Callable[..., tuple[Tensor, Tensor]]

    def encode(self, provider: str, x: Tensor, codec: Codec) -> Packed:
        """See :meth:`turboquant_core.KernelProvider.encode`."""
        return Packed(*self._encode(x, codec_tensors(codec), vector_integers(codec), provider))

    def decode(self, provider: str, packed: Packed, codec: Codec, dtype: torch.dtype) -> Tensor:
        """See :meth:`turboquant_core.KernelProvider.decode`."""
        return self._decode(*packed, codec_tensors(codec), vector_integers(codec), dtype, provider)

    def scores(self, provider: str, query: Tensor, packed: Packed, codec: Codec, *, scaling: float) -> Tensor:
        """See :meth:`turboquant_core.KernelProvider.scores`."""
        return self._scores(query, *packed, codec_tensors(codec), vector_integers(codec), scaling, provider)

    def store(
        self, provider: str, key: Tensor, value: Tensor, pages: Tensor, slot_mapping: Tensor, codec: CacheCodec
    ) -> None:
        """See :meth:`turboquant_core.KernelProvider.store`."""
        self._store(key, value, pages, slot_mapping, *_cache_arguments(codec), provider)

    def attend(
        self,
        provider: str,
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
        """See :meth:`turboquant_core.KernelProvider.attend`."""
        if out is None:
            out = query.new_empty((query.shape[0], query.shape[1], codec.layout.value.head_dim))
        lse = self._attend(
            query,
            pages,
            block_table,
            seq_lens,
            *_cache_arguments(codec),
            scaling,
            window,
            softcap,
            query_start_loc,
            seq_starts,
            sinks,
            out,
            workspace,
            provider,
        )
        return Attended(out, lse)

    def gather(
        self,
        provider: str,
        pages: Tensor,
        block_table: Tensor,
        codec: CacheCodec,
        *,
        start: int,
        stop: int,
        dtype: torch.dtype,
        rotated: bool = False,
    ) -> Gathered:
        """See :meth:`turboquant_core.KernelProvider.gather`."""
        return Gathered(
            *self._gather(pages, block_table, *_cache_arguments(codec), start, stop, dtype, rotated, provider)
        )


def _cache_arguments(codec: CacheCodec) -> tuple[list[Tensor], list[Tensor], list[int]]:
    return codec_tensors(codec.key), codec_tensors(codec.value), cache_integers(codec)
