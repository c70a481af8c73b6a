"""Coordinates of a vector by the width of their codes: the last dimension cut and joined as the layout's parts."""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import VectorLayout


def by_part(x: Tensor, layout: VectorLayout) -> tuple[Tensor, ...]:
    """``[..., head_dim]`` as one tensor for each of ``layout.parts``: itself, or its halves with fractional bits."""
    return x.chunk(len(layout.parts), dim=-1)


def joined(parts: list[Tensor]) -> Tensor:
    """Inverse of :func:`by_part`."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
