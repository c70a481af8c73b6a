"""What operations and providers ask of their arguments, said in one way."""

from __future__ import annotations

import torch
from torch import Tensor


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


def check_pages_used(block_row: Tensor, page_count: int) -> None:
    """Raise ``ValueError`` for a page of ``block_row`` outside the pool."""
    if block_row.numel() and not (int(block_row.min()) >= 0 and int(block_row.max()) < page_count):
        raise ValueError(
            f"block_table names pages {int(block_row.min())} to {int(block_row.max())} for tokens that are read; "
            f"the pool has pages 0 to {page_count - 1}"
        )
