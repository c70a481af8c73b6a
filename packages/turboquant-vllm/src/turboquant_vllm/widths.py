"""Bits of a layer's keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

RAW = "raw"
UNCOMPRESSED = "uncompressed"

ValueBits: TypeAlias = float | Literal["raw"]


@dataclass(frozen=True, slots=True)
class LayerBits:
    """Width of one layer's codes.

    Attributes:
        k_bits: bits of a key coordinate, one of :data:`turboquant_core.layout.BITS`.
        v_bits: bits of a value coordinate, or ``"raw"`` for values in the model's dtype.
    """

    k_bits: float = 4
    v_bits: ValueBits = 4

    def __str__(self) -> str:
        values = "in the model's dtype" if self.v_bits == RAW else f"{self.v_bits} bits"
        return f"keys {self.k_bits} bits, values {values}"


LayerChoice: TypeAlias = LayerBits | Literal["uncompressed"]
