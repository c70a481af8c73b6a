"""Single bits to bytes and back, least significant bit first."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_bits(planes: Tensor) -> Tensor:
    """Bool ``[..., n]`` with ``n`` a multiple of 8 to uint8 ``[..., n / 8]``."""
    weights = torch.tensor([1 << i for i in range(8)], device=planes.device)
    return (planes.reshape(*planes.shape[:-1], planes.shape[-1] // 8, 8) * weights).sum(-1).to(torch.uint8)


def unpack_bits(packed: Tensor) -> Tensor:
    """Inverse of :func:`pack_bits`: bool ``[..., 8 n]``."""
    shifts = torch.arange(8, device=packed.device)
    return (((packed.unsqueeze(-1) >> shifts) & 1) == 1).flatten(-2)
