"""A scalar codebook."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


def mirrored(upper: Iterable[float]) -> tuple[float, ...]:
    """All levels, ascending, of a codebook symmetric about 0 from its positive ones."""
    positive = tuple(upper)
    return tuple(-level for level in reversed(positive)) + positive


@dataclass(frozen=True, slots=True)
class Codebook:
    """Levels of a scalar quantizer, symmetric about 0.

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
