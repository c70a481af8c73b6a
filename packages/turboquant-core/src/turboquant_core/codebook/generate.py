"""Solve the shipped Lloyd-Max codebooks: ``python -m turboquant_core.codebook.generate`` prints the data file."""

from __future__ import annotations

import json

from .density import coordinate_density
from .lloyd import solve
from .textbook import MAX_BITS

HEAD_DIMS = (64, 80, 96, 112, 128, 160, 192, 224, 256, 512, 576)


def solve_all() -> dict[str, dict[str, list[float]]]:
    """The content of ``data/lloyd_max.json``."""
    head_dims: dict[str, int | None] = {"gaussian": None} | {str(d): d for d in HEAD_DIMS}
    return {
        name: {str(bits): solve(bits, coordinate_density(d)).tolist() for bits in range(1, MAX_BITS + 1)}
        for name, d in head_dims.items()
    }


def dump(codebooks: dict[str, dict[str, list[float]]]) -> str:
    """JSON with one density on a line."""
    lines = [f"{json.dumps(name)}:{json.dumps(levels, separators=(',', ':'))}" for name, levels in codebooks.items()]
    return "{\n" + ",\n".join(lines) + "\n}"


if __name__ == "__main__":
    print(dump(solve_all()))
