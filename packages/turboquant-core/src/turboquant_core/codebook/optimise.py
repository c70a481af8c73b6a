"""Re-optimise the format's levels for N(0, 1): ``python -m turboquant_core.codebook.optimise`` prints the data file."""

from __future__ import annotations

import json
from itertools import product
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar

from ..layout import BITS
from .formats import CubicLevels, Int8Levels
from .lloyd import lloyd_max, mean_squared_error

CUBIC_C = {2: 17.625, 3: 41.3125, 4: 112.3125}
"""Multiples of 1/16 near the optimum that half precision holds exactly."""


def _best_step(levels_at_one: np.ndarray[Any, np.dtype[np.float64]], guess: float) -> tuple[float, float]:
    found = minimize_scalar(
        lambda step: mean_squared_error(levels_at_one * step),
        bounds=(guess * 0.9, guess * 1.1),
        method="bounded",
        options={"xatol": 1e-14},
    )
    return float(found.x), float(found.fun)


def optimise_cubic(bits: int) -> CubicLevels:
    """Best step for the form's ``c``."""
    shape = np.asarray(CubicLevels(bits, CUBIC_C[bits], 1.0).levels())
    step, _ = _best_step(shape, lloyd_max(bits).levels[-1] / float(shape[-1]))
    return CubicLevels(bits, CUBIC_C[bits], step)


def _neighbourhood(q: tuple[int, ...], top: int) -> list[tuple[int, ...]]:
    """``q`` with every entry but the top moved by at most one."""
    moves = product((-1, 0, 1), repeat=len(q) - 1)
    return [tuple(a + m for a, m in zip(q, (*move, 0), strict=True)) for move in moves if top <= 127]


def optimise_int8(bits: int) -> Int8Levels:
    """Search the largest byte and the rounding of the others, with the best step for each."""
    upper = np.asarray(lloyd_max(bits).levels[1 << (bits - 1) :])
    best: tuple[float, Int8Levels] | None = None
    for top in range(100, 128):
        step = float(upper[-1]) / (top + 0.5)
        rounded = tuple(int(v) for v in np.round(upper / step - 0.5))
        candidates = _neighbourhood(rounded, top) if bits < 4 else [rounded]
        for q in candidates:
            refined, mse = _best_step(np.asarray(Int8Levels(q, 1.0).levels()), step)
            if best is None or mse < best[0] - 1e-15:
                best = (mse, Int8Levels(q, refined))
    if best is None:
        raise AssertionError("the search has no candidate")
    return best[1]


def optimise() -> dict[str, dict[str, dict[str, Any]]]:
    """The content of ``data/format.json``."""
    int8 = {str(b): {"q": list(found.q), "step": found.step} for b in BITS for found in [optimise_int8(b)]}
    cubic = {str(b): {"c": found.c, "step": found.step} for b in BITS for found in [optimise_cubic(b)]}
    return {"int8": int8, "cubic": cubic}


if __name__ == "__main__":
    print(json.dumps(optimise(), indent=2))
