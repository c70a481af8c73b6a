"""The Lloyd-Max condition (arXiv 2504.19874, equation 4) solved by Newton's method.

Every level is the mean of its cell, every edge the midpoint of two levels. Both densities are log-concave, so exactly
one codebook satisfies this, and it is the best one (Kieffer 1983).
"""

from __future__ import annotations

import numpy as np

from .density import Density, Float64, cells, inner_edges

_TOLERANCE = 1e-13
_MAX_STEPS = 200


def _gradient(upper: Float64, density: Density) -> tuple[Float64, Float64]:
    """``E[level - T; cell]``, half the gradient of half the mean squared error, and the mass of every cell."""
    deviation, weights = cells(upper, density)
    return -(weights * deviation).sum(-1), weights.sum(-1)


def centroid_residual(upper: Float64, density: Density) -> float:
    """Largest distance of a positive level from the mean of its cell."""
    gradient, mass = _gradient(upper, density)
    return float(np.abs(gradient / mass).max())


def _newton(upper: Float64, gradient: Float64, mass: Float64, density: Density) -> Float64:
    """One step of Newton's method; the Jacobian is tridiagonal.

    An edge moves by half of what each neighbouring level moves, and the mass it passes lies at half the levels'
    distance from both. The edge at 0 stays.
    """
    flow = density.pdf(inner_edges(upper)) * np.diff(upper) / 4
    diagonal = mass - np.append(flow, 0.0) - np.insert(flow, 0, 0.0)
    return upper - np.linalg.solve(np.diag(diagonal) - np.diag(flow, 1) - np.diag(flow, -1), gradient)


def solve(bits: int, density: Density) -> Float64:
    """Positive levels of the optimal codebook, ascending: float64 ``[2 ** (bits - 1)]``.

    Raises:
        ArithmeticError: no convergence.
    """
    count = 1 << bits
    upper = density.spread((np.arange(count // 2, count) + 0.5) / count)
    for _ in range(_MAX_STEPS):
        gradient, mass = _gradient(upper, density)
        updated = _newton(upper, gradient, mass, density)
        if np.abs(updated - upper).max() < _TOLERANCE * upper[-1]:
            return updated
        if not _improves(updated, gradient, density):
            # Lloyd's own step is slow but never raises the error; it leads to where Newton's converges.
            updated = upper - gradient / mass
        upper = updated
    raise ArithmeticError(f"Lloyd-Max with {bits} bits on {density} has not converged after {_MAX_STEPS} steps")


def _improves(updated: Float64, gradient: Float64, density: Density) -> bool:
    if updated[0] <= 0 or (np.diff(updated) <= 0).any():
        return False
    return bool(np.linalg.norm(_gradient(updated, density)[0]) < np.linalg.norm(gradient))
