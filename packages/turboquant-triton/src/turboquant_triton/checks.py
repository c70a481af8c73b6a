"""Checks of arguments that need no value from the device: a wrong shape never reaches a kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from turboquant_core import Codec, PageLayout
from turboquant_core.reference.pages import check_pages

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def check_float(x: Tensor, name: str) -> None:
    """Raise ``ValueError`` unless ``x`` is fp16, bf16 or fp32."""
    if x.dtype not in _FLOATS:
        raise ValueError(f"{name} is {x.dtype}; the kernels take float16, bfloat16 or float32")


def check_rounding(codec: Codec | None) -> None:
    """Raise ``ValueError`` for a codec that chooses codes in its own way: the kernels take the nearest level."""
    if codec is not None and type(codec) is not Codec:
        raise ValueError(
            f"{type(codec).__name__} chooses its codes by a search that the kernels do not have; pack with "
            "provider='reference', any provider reads the bytes"
        )


def check_same_device(expected: torch.device, **tensors: Tensor | None) -> None:
    """Raise ``ValueError`` when a tensor is elsewhere: a kernel would read foreign memory."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != expected:
            raise ValueError(f"{name} is on {tensor.device}, the pages on {expected}: move one with .to()")


def check_attend(
    query: Tensor,
    pages: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    layout: PageLayout,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    out: Tensor | None,
) -> None:
    """Raise ``ValueError`` for arguments of ``attend`` that do not fit the layout or one another."""
    check_pages(pages, layout)
    check_float(query, "query")
    check_same_device(pages.device, query=query, block_table=block_table, seq_lens=seq_lens, sinks=sinks, out=out)
    if query.dim() != 3 or query.shape[2] != layout.key.head_dim or query.shape[1] % layout.kv_heads:
        raise ValueError(
            f"query has shape {tuple(query.shape)}; it must be [tokens, q_heads (a multiple of {layout.kv_heads}), "
            f"head_dim = {layout.key.head_dim}]"
        )
    if seq_lens.dim() != 1 or seq_lens.shape[0] == 0 or seq_lens.dtype != torch.int32:
        raise ValueError(f"seq_lens is {seq_lens.dtype} {tuple(seq_lens.shape)}; it must be int32 [batch], batch >= 1")
    if block_table.dim() != 2 or block_table.shape[0] != seq_lens.shape[0] or block_table.dtype != torch.int32:
        raise ValueError(
            f"block_table is {block_table.dtype} {tuple(block_table.shape)}; it must be int32 "
            f"[batch = {seq_lens.shape[0]}, max_pages]"
        )
    if window is not None and window < 1:
        raise ValueError(f"window is {window}; it must be at least 1 or None")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap is {softcap}; it must be positive or None")
    if sinks is not None and sinks.shape != query.shape[1:2]:
        raise ValueError(f"sinks have shape {tuple(sinks.shape)}; they must be [q_heads = {query.shape[1]}]")
    expected = (*query.shape[:2], layout.value.head_dim)
    if out is not None and (tuple(out.shape) != expected or out.dtype != query.dtype or not out.is_contiguous()):
        raise ValueError(f"out is {out.dtype} {tuple(out.shape)}; it must be contiguous {query.dtype} {expected}")
