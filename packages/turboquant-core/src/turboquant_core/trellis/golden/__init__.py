"""Golden bytes of trellis codes: ``python -m turboquant_core.trellis.golden`` prints ``trellis_v1.json``.

The vectors are integers for which the search is far from a tie: perturbing every coordinate by a millionth of the
vector's size does not change a bit.
"""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..code import TRELLIS_BITS
from ..layout import TRELLIS_VERSION
from ..quantizer import TurboQuantTrellis

HEAD_DIMS = (32, 64, 80, 128, 256)
VECTORS = 2
_PERTURBATION = 1e-6
_COPIES = 8


def golden_text(version: int = TRELLIS_VERSION) -> str:
    """The golden file of a version, as text."""
    return files(__package__).joinpath(f"trellis_v{version}.json").read_text(encoding="utf-8")


def _is_clear(x: Tensor, quantizer: TurboQuantTrellis, generator: np.random.Generator) -> bool:
    noise = torch.from_numpy(generator.uniform(-1, 1, (_COPIES, len(x)))).float()
    copies = quantizer.encode(x + _PERTURBATION * x.norm() * noise).packed.codes
    return bool((copies == quantizer.encode(x).packed.codes).all())


def _vectors(head_dim: int) -> Tensor:
    generator = np.random.Generator(np.random.PCG64(head_dim))
    quantizers = [TurboQuantTrellis(head_dim, bits) for bits in TRELLIS_BITS]
    found: list[Tensor] = []
    while len(found) < VECTORS:
        x = torch.from_numpy(generator.integers(-9, 10, head_dim)).float()
        if all(_is_clear(x, quantizer, generator) for quantizer in quantizers):
            found.append(x)
    return torch.stack(found)


def _packed(x: Tensor, bits: int) -> dict[str, Any]:
    packed = TurboQuantTrellis(x.shape[-1], bits).encode(x).packed
    codes = [bytes(row.tolist()).hex() for row in packed.codes]
    return {"bits": bits, "codes": codes, "scales": packed.scales.tolist()}


def document() -> str:
    """The golden file of the current version."""
    cases = []
    for head_dim in HEAD_DIMS:
        x = _vectors(head_dim)
        packed = [_packed(x, bits) for bits in TRELLIS_BITS]
        cases.append({"head_dim": head_dim, "seed": 42, "vectors": x.int().tolist(), "packed": packed})
    body = {"trellis_version": TRELLIS_VERSION, "cases": cases}
    return json.dumps(body, separators=(",", ":")).replace('{"head_dim"', '\n{"head_dim"') + "\n"
