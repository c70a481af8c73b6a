"""Lloyd-Max codebooks (arXiv 2504.19874, equation 4): continuous k-means on the density of one coordinate."""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from .codebook import Codebook

Float64 = NDArray[np.float64]
_TOLERANCE = 1e-13
_MAX_ITERATIONS = 20_000


def _gaussian_moments(edges: Float64) -> tuple[Float64, Float64]:
    density = stats.norm.pdf(edges)
    return np.diff(stats.norm.cdf(edges)), -np.diff(density)


def _beta_moments(edges: Float64, head_dim: int) -> tuple[Float64, Float64]:
    """Mass and first moment of ``t = sqrt(d) y`` with ``f(y) ~ (1 - y^2)^((d-3)/2)`` (section 3.1, Lemma 1)."""
    y = np.clip(edges / np.sqrt(head_dim), -1.0, 1.0)
    shape = (head_dim - 1) / 2
    mass = np.diff(stats.beta.cdf((1 + y) / 2, shape, shape))
    # The density's antiderivative of y f(y) is -(1 - y^2) f(y) / (d - 1).
    tail = (1 - y**2) * stats.beta.pdf((1 + y) / 2, shape, shape) / 2 / (head_dim - 1)
    tail = np.where(np.abs(y) == 1, 0.0, tail)
    return mass, -np.diff(tail) * np.sqrt(head_dim)


def _moments(levels: Float64, head_dim: int | None) -> tuple[Float64, Float64]:
    edges = np.concatenate(([-np.inf], (levels[:-1] + levels[1:]) / 2, [np.inf]))
    return _gaussian_moments(edges) if head_dim is None else _beta_moments(edges, head_dim)


def mean_squared_error(levels: Float64, head_dim: int | None = None) -> float:
    """Error of nearest-level quantization of a unit-variance coordinate (Gaussian, or Beta of ``head_dim``)."""
    mass, first = _moments(levels, head_dim)
    return float(1 - 2 * (levels * first).sum() + (levels**2 * mass).sum())


@cache
def lloyd_max(bits: int, head_dim: int | None = None) -> Codebook:
    """The optimal scalar codebook of a coordinate scaled to unit variance.

    Args:
        bits: 1 to 8.
        head_dim: None for N(0, 1), else the exact density of a coordinate on the unit sphere times sqrt(head_dim).

    Raises:
        ValueError: ``bits`` or ``head_dim`` is out of range.
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"bits is {bits}; codebooks have 1 to 8 bits")
    if head_dim is not None and head_dim < 3:
        raise ValueError(f"head_dim is {head_dim}; a coordinate density needs at least 3")
    count = 1 << bits
    levels = stats.norm.ppf((np.arange(count) + 0.5) / count)
    for _ in range(_MAX_ITERATIONS):
        mass, first = _moments(levels, head_dim)
        updated = first / mass
        updated = (updated - updated[::-1]) / 2
        moved = float(np.abs(updated - levels).max())
        levels = updated
        if moved < _TOLERANCE:
            break
    return Codebook(tuple(levels.tolist()), mean_squared_error(levels, head_dim))
