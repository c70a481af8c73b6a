"""Densities of one rotated coordinate, scaled to unit variance, and the error of a codebook on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import special

from ..integers import integer

SMALLEST_HEAD_DIM = 3
"""Below it, a coordinate of the unit sphere has no density that is bounded."""

Float64 = NDArray[np.float64]
_END = 10.0
"""Where integrals stop: N(0, 1) leaves 8e-24 beyond, a coordinate less."""
_NODES = 64


class Density(Protocol):
    """A density of variance 1, symmetric about 0."""

    def pdf(self, t: Float64) -> Float64:
        """The density at ``t``."""

    def quadrature(self, edges: Float64) -> tuple[Float64, Float64]:
        """Points and weights, each ``[len(edges) - 1, nodes]``, of integrals against the density between edges."""

    def spread(self, probability: Float64) -> Float64:
        """Quantiles of the density proportional to ``pdf ** (1 / 3)``, which many optimal levels follow."""


@cache
def _legendre() -> tuple[Float64, Float64]:
    points, weights = special.roots_legendre(_NODES)
    return points, weights


def _gauss_legendre(edges: Float64) -> tuple[Float64, Float64]:
    points, weights = _legendre()
    half = np.diff(edges)[:, None] / 2
    return edges[:-1, None] + half * (1 + points), half * weights


@dataclass(frozen=True, slots=True)
class Gaussian:
    """N(0, 1), the limit of a coordinate for large head_dim."""

    def pdf(self, t: Float64) -> Float64:
        """The density at ``t``."""
        return np.asarray(np.exp(-t * t / 2) / np.sqrt(2 * np.pi))

    def quadrature(self, edges: Float64) -> tuple[Float64, Float64]:
        """Gauss-Legendre in ``t``."""
        t, weights = _gauss_legendre(np.minimum(edges, _END))
        return t, weights * self.pdf(t)

    def spread(self, probability: Float64) -> Float64:
        """Quantiles of N(0, 3)."""
        return np.asarray(np.sqrt(3) * special.ndtri(probability))


@dataclass(frozen=True, slots=True)
class SphereCoordinate:
    """``sqrt(d) y`` with ``y`` a coordinate of a uniform point on the unit sphere of ``d = head_dim`` dimensions.

    The density of ``y`` is ``(1 - y^2)^((d - 3) / 2) / B(1/2, (d - 1) / 2)`` (arXiv 2504.19874, Lemma 1).
    """

    head_dim: int

    def _in_cosine(self, cosine: Float64, exponent: int) -> Float64:
        return np.asarray(cosine**exponent / special.beta(0.5, (self.head_dim - 1) / 2))

    def pdf(self, t: Float64) -> Float64:
        """The density at ``t`` inside the support."""
        cosine = np.sqrt(np.maximum(1 - t * t / self.head_dim, 0.0))
        return np.asarray(self._in_cosine(cosine, self.head_dim - 3) / np.sqrt(self.head_dim))

    def quadrature(self, edges: Float64) -> tuple[Float64, Float64]:
        """Gauss-Legendre in the angle ``arcsin y``, where the density is smooth up to the end of the support."""
        radius = np.sqrt(self.head_dim)
        angle, weights = _gauss_legendre(np.arcsin(np.minimum(edges, min(_END, radius)) / radius))
        return radius * np.sin(angle), weights * self._in_cosine(np.cos(angle), self.head_dim - 2)

    def spread(self, probability: Float64) -> Float64:
        """Quantiles of the density of ``y`` with the exponent ``(d - 3) / 6``."""
        shape = (self.head_dim + 3) / 6
        return np.asarray(np.sqrt(self.head_dim) * (2 * special.betaincinv(shape, shape, probability) - 1))


def coordinate_density(head_dim: int | None) -> Density:
    """N(0, 1) for None, else the exact density of a coordinate.

    Raises:
        ValueError: ``head_dim`` is below 3.
    """
    if head_dim is None:
        return Gaussian()
    return SphereCoordinate(integer(head_dim, "head_dim", least=SMALLEST_HEAD_DIM))


def inner_edges(upper: Float64) -> Float64:
    """Midpoints of the positive levels."""
    return np.asarray((upper[:-1] + upper[1:]) / 2)


def cells(upper: Float64, density: Density) -> tuple[Float64, Float64]:
    """Deviations from the level, and weights, at the nodes of every positive level's cell: ``[levels, nodes]``."""
    t, weights = density.quadrature(np.concatenate(([0.0], inner_edges(upper), [np.inf])))
    return t - upper[:, None], weights


def mean_squared_error(levels: Sequence[float], density: Density) -> float:
    """Error of quantization to the nearest of ``levels``, an even number, symmetric about 0."""
    deviation, weights = cells(np.asarray(levels[len(levels) // 2 :], dtype=np.float64), density)
    return float(2 * (weights * deviation**2).sum())
