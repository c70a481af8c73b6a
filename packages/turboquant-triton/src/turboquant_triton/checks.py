"""Checks of arguments that need no value from the device: a wrong shape never reaches a kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from turboquant_core import Codec, PageLayout
from turboquant_core.arguments import (
    check_device,
    check_out,
    check_query_shape,
    check_score_options,
    check_sequences,
)
from turboquant_core.reference.pages import check_pages

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def check_float(x: Tensor, name: str) -> None:
    """Raise ``ValueError`` unless ``x`` is fp16, bf16 or fp32."""
    if x.dtype not in _FLOATS:
        raise ValueError(f"{name} is {x.dtype}; the kernels take float16, bfloat16 or float32")


def check_int32(**tensors: Tensor) -> None:
    """Raise ``ValueError`` for a tensor, named by its keyword, of other integers than the kernels load."""
    for name, tensor in tensors.items():
        if tensor.dtype != torch.int32:
            raise ValueError(f"{name} is {tensor.dtype}; the kernels take torch.int32: convert it with .int()")


def check_rounding(codec: Codec | None) -> None:
    """Raise ``ValueError`` for a codec that chooses codes in its own way: the kernels take the nearest level."""
    if codec is not None and type(codec) is not Codec:
        raise ValueError(
            f"{type(codec).__name__} chooses its codes by a search that the kernels do not have; pack with "
            "provider='reference', any provider reads the bytes"
        )


def check_attend(
    query: Tensor,
    pages: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    layout: PageLayout,
    query_start_loc: Tensor | None,
    seq_starts: Tensor | None,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    out: Tensor | None,
) -> None:
    """Raise ``ValueError`` for arguments of ``attend`` that do not fit the layout or one another."""
    check_pages(pages, layout)
    check_device(pages.device, "the pages", query=query, sinks=sinks)
    check_float(query, "query")
    check_query_shape(query, layout)
    check_sequences(query, block_table, seq_lens, query_start_loc, seq_starts)
    check_int32(block_table=block_table, seq_lens=seq_lens)
    check_score_options(query.shape[1], window, softcap, sinks)
    check_out(out, query, layout)
    if out is not None and not out.is_contiguous():
        raise ValueError(f"out has strides {out.stride()}; the kernels write contiguous memory: pass out.contiguous()")
