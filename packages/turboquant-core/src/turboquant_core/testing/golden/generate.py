"""Write the golden files, once per version: ``python -m turboquant_core.testing.golden.generate > layout_vN.json``,
and with the argument ``mixed`` ``layout_vN_mixed.json``.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...codebook import format_codebook
from ...codec import Codec
from ...layout import BITS, FORMS, LAYOUT_VERSION, WIDTHS, VectorLayout
from ...reference import ReferenceProvider
from ...rotation import rotate
from .cases import GOLDEN_HEAD_DIMS

SEED = 42
VECTORS = 3
CLEARANCE = 2e-4


def _codecs(head_dim: int, stream: int) -> list[Codec]:
    return [
        Codec.create(VectorLayout(head_dim, bits, form), seed=SEED, stream=stream) for form in FORMS for bits in WIDTHS
    ]


def _mixed_codecs(head_dim: int, stream: int) -> list[Codec]:
    mixed = [bits for bits in BITS if bits not in WIDTHS]
    return [
        Codec.create(VectorLayout(head_dim, bits, form), seed=SEED, stream=stream) for form in FORMS for bits in mixed
    ]


def _is_clear(x: Tensor, codecs: list[Codec]) -> bool:
    """Whether every rotated coordinate keeps ``CLEARANCE`` standard deviations from every boundary of every codec."""
    z = rotate(x.double(), codecs[0].signs)
    unit = z / z.square().mean().sqrt()
    return all(bool(((unit.unsqueeze(-1) - codec.boundaries).abs() > CLEARANCE).all()) for codec in codecs)


def _vectors(head_dim: int, codecs: list[Codec]) -> Tensor:
    """Integers in -9..9 with unequal channels, drawn until clear of all boundaries."""
    generator = np.random.Generator(np.random.PCG64(head_dim))
    found: list[Tensor] = []
    while len(found) < VECTORS:
        reach = generator.integers(1, 10, head_dim)
        x = torch.from_numpy(generator.integers(-reach, reach + 1)).float()
        if _is_clear(x, codecs):
            found.append(x)
    return torch.stack(found)


def _hex(rows: Tensor) -> list[str]:
    return [bytes(row.tolist()).hex() for row in rows]


def _packed(x: Tensor, codec: Codec) -> dict[str, Any]:
    packed = ReferenceProvider().encode(x, codec)
    scales = packed.scales.unsqueeze(-1).view(torch.uint8)
    return {
        "form": codec.layout.form,
        "bits": codec.layout.bits,
        "codes": _hex(packed.codes),
        "scales": _hex(scales),
    }


def _case(head_dim: int, stream: int) -> dict[str, Any]:
    codecs = _codecs(head_dim, stream)
    x = _vectors(head_dim, codecs)
    return {
        "head_dim": head_dim,
        "seed": SEED,
        "stream": stream,
        "signs": "".join("+" if sign > 0 else "-" for sign in codecs[0].signs.tolist()),
        "vectors": x.int().tolist(),
        "packed": [_packed(x, codec) for codec in codecs],
    }


def document() -> str:
    """The golden file of the current layout version."""
    levels = [
        {"form": form, "bits": bits, "levels": list(format_codebook(form, bits).levels)}
        for form in FORMS
        for bits in WIDTHS
    ]
    # Both streams occur: keys and values of a layer have different signs.
    cases = [_case(head_dim, index % 2) for index, head_dim in enumerate(GOLDEN_HEAD_DIMS)]
    return _text({"layout_version": LAYOUT_VERSION, "levels": levels, "cases": cases})


def mixed_document() -> str:
    """The golden file of the layouts of two widths: packed rows of the vectors of :func:`document`."""
    cases = []
    for index, head_dim in enumerate(GOLDEN_HEAD_DIMS):
        x = _vectors(head_dim, _codecs(head_dim, index % 2))
        packed = [_packed(x, codec) for codec in _mixed_codecs(head_dim, index % 2)]
        cases.append({"head_dim": head_dim, "packed": packed})
    return _text({"layout_version": LAYOUT_VERSION, "cases": cases})


def _text(body: dict[str, Any]) -> str:
    """JSON with one head_dim on a line."""
    return json.dumps(body, separators=(",", ":")).replace('{"head_dim"', '\n{"head_dim"') + "\n"


if __name__ == "__main__":
    sys.stdout.write(mixed_document() if sys.argv[1:] == ["mixed"] else document())
