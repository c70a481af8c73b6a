"""What a cache reports about itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from turboquant_core import MemoryFigures

from .memory import dense_memory
from .packed_layer import PackedLayer


@dataclass(frozen=True, slots=True)
class LayerSummary:
    """One layer.

    Attributes:
        layer_idx: position in the model.
        path: ``fused``, ``intercepted``, ``decoded`` (or several joined by ``+``), ``unused``, or ``uncompressed``.
        bits: (keys, values), None for full precision.
        calls: attention calls over a packed past; those of compiled graphs are not counted.
        reasons: why calls were decoded, with their number; for an uncompressed layer, its kind.
        memory: bytes.
    """

    layer_idx: int
    path: str
    bits: tuple[float | None, float | None]
    calls: int
    reasons: tuple[str, ...]
    memory: MemoryFigures

    @classmethod
    def of(cls, layer_idx: int, layer: Any) -> LayerSummary:
        """Summarise a layer of a cache."""
        if not isinstance(layer, PackedLayer):
            return cls(layer_idx, "uncompressed", (None, None), 0, (type(layer).__name__,), dense_memory(layer))
        counters = layer.counters
        return cls(
            layer_idx,
            counters.path,
            (layer.bits[0], layer.bits[1] if layer.packs_values else None),
            sum(counters.paths.values()),
            counters.why_decoded,
            layer.memory(),
        )


@dataclass(frozen=True, slots=True)
class Summary:
    """All layers; ``print`` gives a table."""

    layers: tuple[LayerSummary, ...]

    def __str__(self) -> str:
        lines = [f"{'layer':>5}  {'path':<14}{'bits':<9}{'calls':>6}{'bytes':>12}{'ratio':>7}  decoded because"]
        for layer in self.layers:
            bits = "/".join("full" if b is None else str(b) for b in layer.bits)
            ratio = f"{layer.memory.compression_ratio:.2f}"
            lines.append(
                f"{layer.layer_idx:>5}  {layer.path:<14}{bits:<9}{layer.calls:>6}{layer.memory.stored:>12}{ratio:>7}  "
                + "; ".join(layer.reasons)
            )
        return "\n".join(lines)
