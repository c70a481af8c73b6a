"""What operations and providers ask of their arguments, said in one way."""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import PageLayout


def check_tensors(**tensors: object) -> None:
    """Raise ``ValueError`` for an argument, named by its keyword, that is no tensor; None stands for none given."""
    for name, tensor in tensors.items():
        if tensor is not None and not isinstance(tensor, Tensor):
            raise ValueError(f"{name} is a {type(tensor).__name__}; it must be a torch.Tensor")


def check_device(device: torch.device, where: str, **tensors: Tensor | None) -> None:
    """Raise ``ValueError`` for a tensor, named by its keyword, on another device than ``where`` is."""
    check_tensors(**tensors)
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, {where} on {device}: move one with .to()")


def check_integers(**tensors: Tensor | None) -> None:
    """Raise ``ValueError`` for a tensor, named by its keyword, that holds no integers."""
    for name, tensor in tensors.items():
        if tensor is not None and (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool):
            raise ValueError(f"{name} is {tensor.dtype}; it must hold integers")


def check_query_shape(query: Tensor, layout: PageLayout) -> None:
    """Raise ``ValueError`` unless ``query`` is ``[tokens, q_heads, head_dim]`` of some groups of query heads."""
    fits = query.dim() == 3 and query.shape[2] == layout.key.head_dim
    if not fits or query.shape[1] % layout.kv_heads or query.shape[1] == 0:
        raise ValueError(
            f"query has shape {tuple(query.shape)}; it must be [tokens, q_heads (a multiple of {layout.kv_heads}), "
            f"head_dim = {layout.key.head_dim}]"
        )


def check_sequences(
    query: Tensor, block_table: Tensor, seq_lens: Tensor, query_start_loc: Tensor | None, seq_starts: Tensor | None
) -> None:
    """Raise ``ValueError`` unless all are of the same sequences, at least one, and hold integers on one device."""
    sequences = {
        "block_table": block_table,
        "seq_lens": seq_lens,
        "query_start_loc": query_start_loc,
        "seq_starts": seq_starts,
    }
    check_device(query.device, "query", **sequences)
    check_integers(**sequences)
    if seq_lens.dim() != 1 or seq_lens.shape[0] == 0:
        raise ValueError(f"seq_lens has shape {tuple(seq_lens.shape)}; it must be [batch] with batch at least 1")
    batch = seq_lens.shape[0]
    if block_table.dim() != 2 or block_table.shape[0] != batch:
        raise ValueError(f"block_table has shape {tuple(block_table.shape)}; it must be [batch = {batch}, max_pages]")
    if query_start_loc is None and query.shape[0] % batch:
        raise ValueError(f"{query.shape[0]} query tokens do not divide by the batch of {batch}; pass query_start_loc")
    if query_start_loc is not None and tuple(query_start_loc.shape) != (batch + 1,):
        raise ValueError(
            f"query_start_loc has shape {tuple(query_start_loc.shape)}; it must be [batch + 1 = {batch + 1}]"
        )
    if seq_starts is not None and tuple(seq_starts.shape) != (batch,):
        raise ValueError(f"seq_starts has shape {tuple(seq_starts.shape)}; it must be [batch = {batch}]")


def check_score_options(q_heads: int, window: int | None, softcap: float | None, sinks: Tensor | None) -> None:
    """Raise ``ValueError`` for what no softmax over ``q_heads`` query heads can follow."""
    if window is not None and window < 1:
        raise ValueError(f"window is {window}; it must be at least 1 or None")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap is {softcap}; it must be positive or None")
    check_tensors(sinks=sinks)
    if sinks is not None and (tuple(sinks.shape) != (q_heads,) or not sinks.is_floating_point()):
        raise ValueError(
            f"sinks are {sinks.dtype} of shape {tuple(sinks.shape)}; they must be float [q_heads = {q_heads}]"
        )


def check_out(out: Tensor | None, query: Tensor, layout: PageLayout) -> None:
    """Raise ``ValueError`` unless ``out`` is None or can hold the attention of ``query``."""
    check_device(query.device, "query", out=out)
    expected = (*query.shape[:2], layout.value.head_dim)
    if out is not None and (tuple(out.shape) != expected or out.dtype != query.dtype):
        raise ValueError(f"out is {out.dtype} {tuple(out.shape)}; it must be {query.dtype} {expected}")


def check_pages_used(block_row: Tensor, page_count: int) -> None:
    """Raise ``ValueError`` for a page of ``block_row`` outside the pool."""
    if block_row.numel() and not (int(block_row.min()) >= 0 and int(block_row.max()) < page_count):
        raise ValueError(
            f"block_table names pages {int(block_row.min())} to {int(block_row.max())} for tokens that are read; "
            f"the pool has pages 0 to {page_count - 1}"
        )
