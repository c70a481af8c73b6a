"""Checks of the arguments of store_exact and attend_exact that need no value from the device."""

from __future__ import annotations

import torch
from torch import Tensor

from turboquant_core import Attended, CacheCodec, PageLayout
from turboquant_core.arguments import check_device, check_integers
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
    if not packed.out.is_contiguous() or not packed.lse.is_contiguous() or packed.lse.dtype != torch.float32:
        raise ValueError("packed must be what attend gave: contiguous, with float32 lse")
