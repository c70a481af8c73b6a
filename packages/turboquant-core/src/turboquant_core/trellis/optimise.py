"""Train the levels of the shipped codes: ``python -m turboquant_core.trellis.optimise`` prints the data file.

The levels of a code are the means of the Gaussian coordinates that take them (Lloyd's iteration with the search in
place of the nearest level), moved to the nearest level of the int8 form. The masks were found by trying random codes of
odd weight, under which negating a vector negates its code; :func:`search` is that trial.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..codebook import Int8Levels, lloyd_max
from ..gaussian import normal_numbers
from .code import MEMORY, PARITIES, TRELLIS_BITS, TrellisCode, trellis_code
from .viterbi import nearest_sequence

HEAD_DIM = 128
VECTORS = 2048
ITERATIONS = 48
LARGEST_BYTE = 114


def gaussian_vectors(vectors: int, seed: int) -> Tensor:
    """float32 ``[vectors, HEAD_DIM]`` of independent N(0, 1)."""
    return torch.from_numpy(normal_numbers(vectors * HEAD_DIM, seed).reshape(vectors, HEAD_DIM).astype(np.float32))


def level_indices(x: Tensor, code: TrellisCode) -> Tensor:
    """Level index of each coordinate ``[vectors, HEAD_DIM]``."""
    path, free = nearest_sequence(x, code)
    return (free << PARITIES) + code.subset_of(path)


def mean_squared_error(x: Tensor, code: TrellisCode) -> float:
    """Mean squared error of the code's levels on ``x``, without a scale."""
    return float((x - torch.tensor(code.values)[level_indices(x, code)]).square().mean())


def retrained(code: TrellisCode, x: Tensor) -> TrellisCode:
    """The code with each level moved to the mean of the coordinates of ``x`` and ``-x`` that take it."""
    index, count = level_indices(x, code).flatten(), len(code.values)
    total = torch.zeros(count, dtype=torch.float64).index_add_(0, index, x.flatten().double())
    number = torch.bincount(index, minlength=count)
    levels = (total - total.flip(0)) / (number + number.flip(0)).clamp(min=1)
    return TrellisCode(code.bits, code.masks, tuple(sorted(levels.tolist())))


def train(bits: int, masks: tuple[int, ...], x: Tensor, iterations: int) -> TrellisCode:
    """Levels for a code, from those of the scalar quantizer with as many levels."""
    code = TrellisCode(bits, masks, lloyd_max(bits + PARITIES - 1).levels)
    for _ in range(iterations):
        code = retrained(code, x)
    return code


def to_int8(levels: tuple[float, ...]) -> Int8Levels:
    """The nearest levels ``(q + 1/2) * step`` with ``LARGEST_BYTE`` as the largest ``q``."""
    upper = np.asarray(levels[len(levels) // 2 :])
    step = float(np.float32(upper[-1] / (LARGEST_BYTE + 0.5)))
    return Int8Levels(tuple(np.round(upper / step - 0.5).astype(int).tolist()), step)


def search(bits: int, trials: int, seed: int, vectors: int = 128) -> list[tuple[float, tuple[int, ...]]]:
    """Error and masks of random codes, best first, each trained for a few iterations from the shipped levels."""
    generator = np.random.Generator(np.random.PCG64(seed))
    found: list[tuple[float, tuple[int, ...]]] = []
    x = gaussian_vectors(vectors, seed)
    while len(found) < trials:
        masks = tuple(int(mask) for mask in generator.integers(1, 1 << (MEMORY + 1), PARITIES))
        spans = any(mask & 1 for mask in masks) and any(mask >> MEMORY for mask in masks)
        if spans and len(set(masks)) == PARITIES and all(mask.bit_count() % 2 for mask in masks):
            code = TrellisCode(bits, masks, trellis_code(bits).values)
            for _ in range(3):
                code = retrained(code, x)
            found.append((mean_squared_error(x, code), masks))
    return sorted(found)


def optimise() -> dict[str, dict[str, Any]]:
    """The content of ``data/trellis.json``, for the shipped masks."""
    found = {}
    for bits in TRELLIS_BITS:
        masks = trellis_code(bits).masks
        levels = to_int8(train(bits, masks, gaussian_vectors(VECTORS, bits), ITERATIONS).values)
        found[str(bits)] = {"masks": list(masks), "q": list(levels.q), "step": levels.step}
    return found


if __name__ == "__main__":
    print(json.dumps(optimise(), indent=2))
