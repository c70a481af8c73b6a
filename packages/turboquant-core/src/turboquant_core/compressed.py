"""Packed vectors with what it takes to read them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from hashlib import sha256

import torch
from torch import Tensor

from .codec import KEY_STREAM
from .layout import RowLayout
from .provider import Packed


@dataclass(frozen=True, slots=True)
class Coding:
    """How vectors became bytes: what a reader has to know and the bytes do not show.

    Attributes:
        layout: where the bits lie.
        seed: of the rotation.
        stream: of the rotation.
        center: SHA-256 of the centre that was subtracted (:func:`center_digest`); None for none.
    """

    layout: RowLayout
    seed: int
    stream: int = KEY_STREAM
    center: str | None = None

    def check_reader(self, reader: Coding) -> None:
        """Raise ``ValueError`` unless bytes made in this way are read as ``reader`` reads them."""
        names = [field.name for field in fields(self)]
        differs = [name for name in names if getattr(self, name) != getattr(reader, name)]
        if differs:
            made, read = (", ".join(f"{name} {getattr(side, name)}" for name in differs) for side in (self, reader))
            raise ValueError(
                f"these vectors were packed with {made}, this quantizer reads {read}: decode with the quantizer that "
                "packed them, or with one made from the same arguments"
            )


def check_encoded(value: object, kind: type) -> None:
    """Raise ``ValueError`` for what no ``encode`` of the quantizer gave."""
    if not isinstance(value, kind):
        raise ValueError(f"decoded is what encode() gave, a {kind.__name__}; this is a {type(value).__name__}")


def center_digest(center: Tensor | None) -> str | None:
    """SHA-256 of a centre's float32 numbers, hexadecimal; None without a centre."""
    if center is None:
        return None
    return sha256(center.detach().to("cpu", torch.float32).contiguous().numpy().tobytes()).hexdigest()


@dataclass(frozen=True, slots=True)
class CompressedTensor:
    """Packed vectors with what it takes to read them.

    Attributes:
        packed: codes uint8 ``[..., code_bytes]`` and scales fp16 ``[...]``.
        coding: layout, rotation and centre; another quantizer than one of the same coding refuses these vectors.
        dtype: dtype of the tensor that was encoded.
    """

    packed: Packed
    coding: Coding
    dtype: torch.dtype

    @property
    def layout(self) -> RowLayout:
        """Where the bits lie."""
        return self.coding.layout

    @property
    def shape(self) -> torch.Size:
        """Shape of the tensor that was encoded: ``[..., head_dim]``."""
        return torch.Size((*self.packed.scales.shape, self.layout.head_dim))

    @property
    def nbytes(self) -> int:
        """True bytes stored: codes and scales."""
        return self.packed.nbytes

    @property
    def compression_ratio(self) -> float:
        """Bytes of the encoded tensor in its own dtype over the true bytes stored; 1.0 for no vectors."""
        return compression_ratio(self.shape, self.dtype, self.nbytes)


def compression_ratio(shape: torch.Size, dtype: torch.dtype, nbytes: int) -> float:
    """Bytes of a tensor of ``shape`` and ``dtype`` over ``nbytes``; 1.0 where nothing is stored."""
    return shape.numel() * dtype.itemsize / nbytes if nbytes else 1.0
