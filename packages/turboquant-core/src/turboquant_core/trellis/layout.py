"""Where the bits of a trellis-coded vector lie (normative text: ``docs/layout.md``)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..bits import pack_bits, unpack_bits
from ..errors import LayoutError
from ..integers import integer
from ..layout import HEAD_DIM_MULTIPLE, MAX_HEAD_DIM, SCALE_BYTES
from .code import MEMORY, check_trellis_bits

TRELLIS_VERSION = 1
"""Changes whenever the same vector gives different bytes; apart from the version of the packed layout."""

SMALLEST_HEAD_DIM = 4 * MEMORY
"""Below it, ending in the state of the start costs more than the code gains."""


@dataclass(frozen=True, slots=True)
class TrellisLayout:
    """One trellis-coded vector: ``bits`` planes of ``head_dim / 8`` bytes and one fp16 scale.

    Args:
        head_dim: coordinates of the vector, a multiple of 8 in [32, 1024].
        bits: 2 or 3.
        version: version that the bytes follow.

    Raises:
        LayoutError: a field is outside the set above.
    """

    head_dim: int
    bits: int
    version: int = TRELLIS_VERSION

    def __post_init__(self) -> None:
        object.__setattr__(self, "bits", check_trellis_bits(self.bits))
        object.__setattr__(self, "head_dim", integer(self.head_dim, "head_dim", error=LayoutError))
        if self.head_dim % HEAD_DIM_MULTIPLE or not SMALLEST_HEAD_DIM <= self.head_dim <= MAX_HEAD_DIM:
            raise LayoutError(
                f"head_dim is {self.head_dim}; trellis codes take multiples of {HEAD_DIM_MULTIPLE} from "
                f"{SMALLEST_HEAD_DIM} to {MAX_HEAD_DIM}"
            )
        if self.version != TRELLIS_VERSION:
            raise LayoutError(f"trellis version is {self.version}; this release reads {TRELLIS_VERSION}")

    @property
    def code_bytes(self) -> int:
        """Bytes of the code row."""
        return self.head_dim * self.bits // 8

    @property
    def nbytes(self) -> int:
        """All bytes of one vector."""
        return self.code_bytes + SCALE_BYTES


def pack_planes(path: Tensor, free: Tensor, layout: TrellisLayout) -> Tensor:
    """Path bits 0 or 1 and free indices ``[..., head_dim]`` to code rows uint8 ``[..., code_bytes]``."""
    planes = [path, *((free >> plane) & 1 for plane in range(layout.bits - 1))]
    return pack_bits(torch.cat(planes, dim=-1) == 1)


def unpack_planes(rows: Tensor, layout: TrellisLayout) -> tuple[Tensor, Tensor]:
    """Inverse of :func:`pack_planes`, int64.

    Raises:
        ValueError: ``rows`` are not uint8 ``[..., code_bytes]``.
    """
    if rows.dtype != torch.uint8 or rows.dim() == 0 or rows.shape[-1] != layout.code_bytes:
        raise ValueError(
            f"trellis rows are {rows.dtype} {tuple(rows.shape)}; they must be torch.uint8 [..., {layout.code_bytes}]"
        )
    planes = unpack_bits(rows).unflatten(-1, (layout.bits, layout.head_dim)).long()
    shifts = torch.arange(layout.bits - 1, device=rows.device).unsqueeze(-1)
    return planes[..., 0, :], (planes[..., 1:, :] << shifts).sum(-2)
