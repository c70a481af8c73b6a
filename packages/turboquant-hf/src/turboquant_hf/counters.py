"""How often each layer's attention ran packed, and how often it could not and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch

Path: TypeAlias = Literal["fused", "intercepted", "decoded"]


@dataclass(slots=True)
class LayerCounters:
    """Calls of one layer that attended to packed tokens.

    Attributes:
        paths: calls by path: ``fused`` (registered attention function), ``intercepted``
            (``scaled_dot_product_attention`` of an untouched model), ``decoded`` (everything else).
        reasons: why calls were decoded, with their number.
        traced: paths that compiled graphs take, with the reason of a decoded one; their calls are not counted.
    """

    paths: Counter[Path] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    traced: dict[Path, str] = field(default_factory=dict)

    def count(self, path: Path, reason: str = "") -> None:
        """Count a call, and why it was decoded if it was."""
        if torch.compiler.is_compiling():
            self._trace(path, reason)
            return
        self.paths[path] += 1
        if reason:
            self.reasons[reason] += 1

    # Runs once, when a graph is made: a number that every step changes would be a new graph in every step.
    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def _trace(self, path: Path, reason: str) -> None:
        self.traced[path] = reason

    @property
    def path(self) -> str:
        """The path that every call took; several joined by ``+``; ``unused`` before the first."""
        taken = self.traced.keys() | {path for path, calls in self.paths.items() if calls}
        return "+".join(path for path in ("fused", "intercepted", "decoded") if path in taken) or "unused"

    @property
    def why_decoded(self) -> tuple[str, ...]:
        """Reasons of decoded calls, each with their number or ``compiled``."""
        counted = tuple(f"{reason} ({count})" for reason, count in self.reasons.items())
        return (*counted, *(f"{reason} (compiled)" for reason in self.traced.values() if reason))
