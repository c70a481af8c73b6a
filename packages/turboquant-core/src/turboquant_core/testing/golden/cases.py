"""Read the golden file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import torch
from torch import Tensor

from ...layout import LAYOUT_VERSION, Form

GOLDEN_HEAD_DIMS = (16, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512, 576)


@dataclass(frozen=True, slots=True)
class GoldenCase:
    """What one codec makes of a few vectors.

    Attributes:
        seed: rotation seed.
        stream: rotation stream.
        vectors: float32 ``[n, head_dim]``, small integers.
        codes: uint8 ``[n, code_bytes]``.
        scales: fp16 ``[n]``.
    """

    seed: int
    stream: int
    vectors: Tensor
    codes: Tensor
    scales: Tensor


def golden_text(version: int = LAYOUT_VERSION, *, mixed: bool = False) -> str:
    """A golden file of a layout version, as text: of the layouts of one width, or ``mixed`` of those of two."""
    name = f"layout_v{version}_mixed.json" if mixed else f"layout_v{version}.json"
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _bytes(rows: list[str]) -> Tensor:
    return torch.tensor([list(bytes.fromhex(row)) for row in rows], dtype=torch.uint8)


@cache
def golden_cases() -> dict[tuple[int, float, Form], GoldenCase]:
    """Every golden case by (head_dim, bits, form)."""
    cases = {}
    mixed = {entry["head_dim"]: entry["packed"] for entry in json.loads(golden_text(mixed=True))["cases"]}
    for entry in json.loads(golden_text())["cases"]:
        vectors = torch.tensor(entry["vectors"], dtype=torch.float32)
        for packed in entry["packed"] + mixed[entry["head_dim"]]:
            cases[entry["head_dim"], packed["bits"], packed["form"]] = GoldenCase(
                seed=entry["seed"],
                stream=entry["stream"],
                vectors=vectors,
                codes=_bytes(packed["codes"]),
                scales=_bytes(packed["scales"]).view(torch.float16).squeeze(-1),
            )
    return cases
