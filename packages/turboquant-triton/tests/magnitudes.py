"""Magnitudes at which a look-up by cells could go wrong."""

from __future__ import annotations

import torch
from torch import Tensor

from turboquant_triton.kernels.cells import BEYOND, CELLS, CELLS_PER_UNIT


def positive(values: Tensor) -> Tensor:
    """The half above zero of boundaries (without zero itself) or of levels."""
    return values[(values.numel() + 1) // 2 :]


def neighbours(values: Tensor, steps: int) -> Tensor:
    """Positive float32 numbers up to ``steps`` representable ones away from each of ``values``."""
    around = torch.arange(-steps, steps + 1, dtype=torch.int32, device=values.device)
    return (values.view(torch.int32)[:, None] + around).flatten().view(torch.float32)


def cell_edges(device: torch.device) -> Tensor:
    """Every magnitude at which a fraction of a cell, of those that an address counts, gives way to the next."""
    fractions = torch.arange(1, 8 * CELLS.value + 16, device=device)
    edges = torch.cat([(fractions - 0.5) / 8, (fractions - 0.5) / 4])
    return torch.cat([edges / CELLS_PER_UNIT.value, edges.new_tensor([BEYOND.value])])
