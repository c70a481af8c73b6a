"""The convolutional code and the levels of each width: solved once and shipped (:mod:`.optimise`)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from ..codebook import Int8Levels
from ..errors import LayoutError
from ..integers import integer_of

TRELLIS_BITS = (2, 3)
MEMORY = 8
"""Past path bits that a level depends on: the trellis has ``2**MEMORY`` states."""
PARITIES = 3
"""Bits of the level index that the path decides; one of ``2**PARITIES`` subsets of the levels."""


def check_trellis_bits(bits: object) -> int:
    """``bits`` as an int; ``LayoutError`` unless it is 2 or 3."""
    return integer_of(bits, "bits", TRELLIS_BITS, what="trellis codes have", error=LayoutError)


@dataclass(frozen=True)
class TrellisCode:
    """What turns stored bits into levels.

    A coordinate's level index is ``free * 8 + z``. ``free`` are its own ``bits - 1`` bits; bit ``k`` of ``z`` is the
    parity of ``window & masks[k]``, where bit ``j`` of ``window`` is the path bit of the coordinate ``j`` before it,
    around the end of the vector.

    Attributes:
        bits: 2 or 3.
        masks: the generators of the convolutional code, nine bits each.
        values: ``2 ** (bits + 2)`` levels, ascending, for a coordinate of unit variance.
    """

    bits: int
    masks: tuple[int, ...]
    values: tuple[float, ...]

    @cached_property
    def subsets(self) -> Tensor:
        """The subset ``z`` of each window: int64 ``[512]``."""
        windows = range(1 << (MEMORY + 1))
        z = [sum(((window & mask).bit_count() & 1) << k for k, mask in enumerate(self.masks)) for window in windows]
        return torch.tensor(z)

    def levels(self, device: torch.device | str = "cpu") -> Tensor:
        """float32 ``[free, subset]``: level ``free * 8 + z`` at ``[free, z]``."""
        levels = torch.tensor(self.values, dtype=torch.float32, device=device)
        return levels.view(-1, 1 << PARITIES)

    def subset_of(self, path: Tensor) -> Tensor:
        """Subset of each coordinate from path bits int64 ``[..., head_dim]``: int64 of the same shape."""
        window = path
        for j in range(1, MEMORY + 1):
            window = window | (path.roll(j, -1) << j)
        return self.subsets.to(path.device)[window]


@cache
def _data() -> dict[str, dict[str, Any]]:
    return dict(json.loads(files(__package__).joinpath("data/trellis.json").read_text("utf-8")))


def trellis_constants(bits: int) -> Int8Levels:
    """The levels of a width as a kernel would make them.

    Raises:
        LayoutError: ``bits`` is not 2 or 3.
    """
    bits = check_trellis_bits(bits)
    return Int8Levels(tuple(_data()[str(bits)]["q"]), _data()[str(bits)]["step"])


def trellis_code(bits: int) -> TrellisCode:
    """The code of a width.

    Raises:
        LayoutError: ``bits`` is not 2 or 3.
    """
    return _code(check_trellis_bits(bits))


@cache
def _code(bits: int) -> TrellisCode:
    return TrellisCode(bits, tuple(_data()[str(bits)]["masks"]), trellis_constants(bits).levels())
