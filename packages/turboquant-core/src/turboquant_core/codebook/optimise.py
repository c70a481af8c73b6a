"""Re-optimise the format's levels for N(0, 1): ``python -m turboquant_core.codebook.optimise`` prints the data file.

The steps agree with the shipped ones to 1e-7: those are part of the layout and stay as they were first computed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
from scipy.optimize import brentq

from ..layout import WIDTHS
from .density import Gaussian, cells, mean_squared_error
from .formats import CubicLevels, Int8Levels
from .textbook import lloyd_max

CUBIC_C = {2: 17.625, 3: 41.3125, 4: 112.3125}
"""Multiples of 1/16 that half precision holds exactly; the best one costs at most 0.005 % less error."""
_EXHAUSTIVE_BITS = 3


def best_step(levels_at_one: Sequence[float], guess: float) -> float:
    """The step with the least error near ``guess``: where its derivative, the sum of level times error, is 0."""
    upper = np.asarray(levels_at_one[len(levels_at_one) // 2 :])

    def slope(step: float) -> float:
        deviation, weights = cells(step * upper, Gaussian())
        return float(upper @ (weights * deviation).sum(-1))

    return float(brentq(slope, guess * 0.8, guess * 1.2, xtol=1e-18, rtol=1e-14))


def optimise_cubic(bits: int, c: float) -> CubicLevels:
    """Best step for ``c``."""
    shape = CubicLevels(bits, c, 1.0).levels()
    return CubicLevels(bits, c, best_step(shape, lloyd_max(bits).levels[-1] / shape[-1]))


def _candidates(rounded: tuple[int, ...]) -> list[tuple[int, ...]]:
    """``rounded`` with every entry but the last moved by at most one, where there are few enough to try them all."""
    moves = product((-1, 0, 1), repeat=len(rounded) - 1)
    return [tuple(q + move for q, move in zip(rounded, (*moved, 0), strict=True)) for moved in moves]


def optimise_int8(bits: int) -> Int8Levels:
    """Try every largest byte from 100 to 127 with the other levels rounded, each with its best step."""
    upper = np.asarray(lloyd_max(bits).levels[1 << (bits - 1) :])
    found = []
    for top in range(100, 128):
        step = float(upper[-1]) / (top + 0.5)
        rounded = tuple(np.round(upper / step - 0.5).astype(int).tolist())
        for q in _candidates(rounded) if bits <= _EXHAUSTIVE_BITS else [rounded]:
            found.append(Int8Levels(q, best_step(Int8Levels(q, 1.0).levels(), step)))
    return min(found, key=lambda constants: mean_squared_error(constants.levels(), Gaussian()))


def optimise() -> dict[str, dict[str, dict[str, Any]]]:
    """The content of ``data/format.json``."""
    int8 = {str(b): {"q": list(found.q), "step": found.step} for b in WIDTHS for found in [optimise_int8(b)]}
    cubic = {str(b): {"c": found.c, "step": found.step} for b in WIDTHS for found in [optimise_cubic(b, CUBIC_C[b])]}
    return {"int8": int8, "cubic": cubic}


if __name__ == "__main__":
    print(json.dumps(optimise(), indent=2))
