"""How often each layer's attention ran packed, and how often it could not and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

Path: TypeAlias = Literal["fused", "intercepted", "decoded"]


@dataclass(slots=True)
class LayerCounters:
    """Calls of one layer that attended to packed tokens.

    Attributes:
        paths: calls by path: ``fused`` (registered attention function), ``intercepted``
            (``scaled_dot_product_attention`` of an untouched model), ``decoded`` (everything else).
        reasons: why calls were decoded, with their number.
    """

    paths: Counter[Path] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)

    def decoded(self, reason: str) -> None:
        """Count a call that decoded the keys and values."""
        self.paths["decoded"] += 1
        self.reasons[reason] += 1

    @property
    def path(self) -> str:
        """The path that every call took; several joined by ``+``; ``unused`` before the first."""
        return "+".join(path for path in ("fused", "intercepted", "decoded") if self.paths[path]) or "unused"
