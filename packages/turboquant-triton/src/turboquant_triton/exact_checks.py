"""Checks of the arguments of store_exact, attend_exact and add_tokens that need no value from the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from turboquant_core import Attended, CacheCodec, Gathered, PageLayout
from turboquant_core.arguments import check_device, check_integers, check_score_options
from turboquant_core.codec import check_center
from turboquant_core.reference.exact import check_recent
from turboquant_core.reference.pages import check_pages


def check_store_exact(key: Tensor, value: Tensor, pages: Tensor, slot_mapping: Tensor, layout: PageLayout) -> None:
    """Raise ``ValueError`` unless the arguments of ``store_exact`` fit the layout and lie on the pages' device."""
    check_pages(pages, layout)
    check_device(pages.device, "the pages", key=key, value=value, slot_mapping=slot_mapping)
    check_integers(slot_mapping=slot_mapping)
    for name, x, head_dim in (("key", key, layout.key.head_dim), ("value", value, layout.value.head_dim)):
        expected = (*slot_mapping.shape, layout.kv_heads, head_dim)
        if tuple(x.shape) != expected or x.dtype != key.dtype:
            raise ValueError(
                f"{name} is {x.dtype} {tuple(x.shape)}; slot_mapping and layout need {expected}, {key.dtype}"
            )


def check_attend_exact(
    query: Tensor,
    pages: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    codec: CacheCodec,
    packed: Attended,
    recent: int,
    query_start_loc: Tensor | None,
    softcap: float | None,
) -> None:
    """Raise ``ValueError`` for arguments of ``attend_exact`` that do not fit the layout or one another."""
    layout = codec.layout
    check_pages(pages, layout)
    check_device(
        pages.device,
        "the pages",
        query=query,
        block_table=block_table,
        seq_lens=seq_lens,
        query_start_loc=query_start_loc,
        out=packed.out,
        lse=packed.lse,
    )
    check_center(codec, softcap, None)
    check_recent(query, seq_lens, layout, recent, query_start_loc)
    expected = (*query.shape[:2], layout.value.head_dim)
    if tuple(packed.out.shape) != expected or packed.lse.shape != query.shape[:2]:
        raise ValueError(
            f"packed is {tuple(packed.out.shape)} and {tuple(packed.lse.shape)}; the query needs {expected} and "
            f"{expected[:2]}"
        )
    _check_part(packed, "packed")


def _check_part(part: Attended, name: str) -> None:
    if not part.out.is_contiguous() or not part.lse.is_contiguous() or part.lse.dtype != torch.float32:
        raise ValueError(f"{name} must be what attend gave: contiguous, with float32 lse")


def check_add_tokens(
    part: Attended,
    query: Tensor,
    exact: Sequence[Gathered],
    center: Tensor | None,
    softcap: float | None,
    sinks: Tensor | None,
    visible: Tensor | None,
) -> None:
    """Raise ``ValueError`` for arguments of ``add_tokens`` that do not fit one another."""
    if not 1 <= len(exact) <= 2:
        raise ValueError(f"there are {len(exact)} runs of exact tokens; add_tokens takes one or two")
    batch, kv_heads, _, head_dim = exact[0].keys.shape
    value_dim, dtype = exact[0].values.shape[3], exact[0].keys.dtype
    for keys, values in exact:
        tokens = keys.shape[2]
        expected = ((batch, kv_heads, tokens, head_dim), (batch, kv_heads, tokens, value_dim))
        if (keys.shape, values.shape) != expected or keys.dtype != dtype or values.dtype != dtype:
            raise ValueError(
                f"exact keys are {keys.dtype} {tuple(keys.shape)} and values {values.dtype} {tuple(values.shape)}; the "
                f"first run needs {dtype} {expected[0]} and {expected[1]}"
            )
    heads = query.shape[1]
    if query.dim() != 4 or query.shape != (batch, heads, 1, head_dim) or heads % kv_heads:
        raise ValueError(
            f"query is {tuple(query.shape)}; exact tokens need [{batch}, a multiple of {kv_heads}, 1, {head_dim}]"
        )
    if part.out.shape != (batch, heads, 1, value_dim) or part.lse.shape != (batch, heads, 1):
        raise ValueError(
            f"part is {tuple(part.out.shape)} and {tuple(part.lse.shape)}; the query needs "
            f"{(batch, heads, 1, value_dim)} and {(batch, heads, 1)}"
        )
    _check_part(part, "part")
    tokens = sum(run.keys.shape[2] for run in exact)
    if visible is not None and (visible.dtype != torch.bool or visible.shape != (batch, tokens)):
        raise ValueError(
            f"visible is {visible.dtype} {tuple(visible.shape)}; the runs need torch.bool {(batch, tokens)}"
        )
    check_score_options(heads, None, softcap, sinks)
    check_device(
        query.device, "the query", center=center, sinks=sinks, visible=visible, out=part.out, exact=exact[0].keys
    )
