"""Vectors on their way into codes: rotated, of safe magnitude, with what the stored scale needs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .rotation import rotate
from .scale import ScaleRule, to_stored, vector_scale


@dataclass(frozen=True, slots=True)
class Rotated:
    """Vectors after centre and rotation, each divided by a power of two.

    Attributes:
        z: float32 ``[..., head_dim]``, zeros in place of a vector that is not finite.
        factor: float32 ``[..., 1]``, the power of two.
        finite: bool ``[..., 1]``.
    """

    z: Tensor
    factor: Tensor
    finite: Tensor

    def unit_variance(self) -> Tensor:
        """Each vector over the root mean square of its coordinates; zeros stay zeros."""
        rms = self.z.square().mean(-1, keepdim=True).sqrt()
        return self.z / torch.where(rms > 0, rms, torch.ones_like(rms))

    def stored_scale(self, levels: Tensor, rule: ScaleRule) -> Tensor:
        """fp16 ``[...]`` by ``rule`` for the levels of the codes ``[..., head_dim]``; NaN where not finite."""
        scale = vector_scale(self.z, levels, rule) * self.factor.squeeze(-1)
        return to_stored(torch.where(self.finite.squeeze(-1), scale, torch.full_like(scale, torch.nan)))


def rotate_vectors(x: Tensor, signs: Tensor, center: Tensor | None = None) -> Rotated:
    """Centre and rotate float ``[..., head_dim]``; ``center`` float32 ``[kv_heads, head_dim]`` as in a codec."""
    x = x.to(torch.float32)
    if center is not None:
        x = x - center
    finite = x.isfinite().all(-1, keepdim=True)
    x = torch.where(finite, x, torch.zeros_like(x))
    factor = power_of_two(x)
    return Rotated(rotate(x / factor, signs), factor, finite)


def power_of_two(x: Tensor) -> Tensor:
    """Power of two near each vector's largest coordinate: dividing by it is exact and keeps squares in range."""
    exponent = torch.frexp(x.abs().amax(-1, keepdim=True)).exponent.clamp(-126, 126)
    return torch.ldexp(torch.ones_like(x[..., :1]), exponent)
