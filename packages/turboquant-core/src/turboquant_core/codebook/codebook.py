"""A scalar codebook."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Codebook:
    """Levels of a scalar quantizer.

    Attributes:
        levels: ascending, for a coordinate of unit variance.
        mse: mean squared error on the density it is meant for.
    """

    levels: tuple[float, ...]
    mse: float

    @property
    def boundaries(self) -> tuple[float, ...]:
        """Midpoints of neighbouring levels."""
        return tuple((low + high) / 2 for low, high in zip(self.levels[:-1], self.levels[1:], strict=True))

    def tensors(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Levels and boundaries as float32 tensors."""
        return (
            torch.tensor(self.levels, dtype=torch.float32, device=device),
            torch.tensor(self.boundaries, dtype=torch.float32, device=device),
        )
