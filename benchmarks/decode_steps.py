"""Timed decode steps: after enough untimed ones, and none of them a step in which a kernel was compiled."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

WARM_UP = 20
"""Untimed steps: lengths of every remainder by 16, which kernels are compiled for, and one that takes a new page."""
LEAST_WARM_UP = 3
"""Of these, as many as are taken however slow they are: the first ones compile and record."""
WARM_UP_SECONDS = 10.0
"""No more untimed steps are begun after so long, the first ones not counted."""
LEAST_TIMED = 5
TIMED_SECONDS = 20.0
"""No more steps are timed after so long, once there are :data:`LEAST_TIMED`."""

Take = Callable[[], float]
"""Runs one step and gives its seconds."""


@dataclass(frozen=True)
class Decoded:
    """What the steps of one cache took.

    Attributes:
        untimed: seconds of the steps before.
        timed: seconds of the steps that count.
        compiled: kernels compiled after the warm-up, by name; their steps do not count.
    """

    untimed: list[float]
    timed: list[float]
    compiled: list[str]

    def row(self, batch: int) -> dict[str, Any]:
        """Figures of the file."""
        middle = median(self.timed)
        return {
            "first_step_seconds": self.untimed[0],
            "untimed_steps": len(self.untimed),
            "timed_steps": len(self.timed),
            "compiled_later": self.compiled,
            "median_step_seconds": middle,
            "slowest_step_seconds": max(self.timed),
            "fastest_step_seconds": min(self.timed),
            "tokens_per_second": batch / middle,
        }


def room(steps: int) -> int:
    """Tokens that :func:`decode` may add."""
    return WARM_UP + 2 * steps


@contextmanager
def compilations() -> Iterator[list[str]]:
    """Names of the Triton kernels that are compiled within the block, those found in a file included."""
    names: list[str] = []
    try:
        runtime = importlib.import_module("triton").knobs.runtime
    except ImportError:
        # Nothing is compiled then.
        yield names
        return

    def note(*_: Any, **call: Any) -> None:
        names.append(call["fn"].name)

    before, runtime.jit_post_compile_hook = runtime.jit_post_compile_hook, note
    try:
        yield names
    finally:
        runtime.jit_post_compile_hook = before


def warm_up(take: Take) -> list[float]:
    """Seconds of :data:`WARM_UP` steps, of fewer where they are slow."""
    seconds = [take() for _ in range(LEAST_WARM_UP)]
    while len(seconds) < WARM_UP and sum(seconds[LEAST_WARM_UP:]) < WARM_UP_SECONDS:
        seconds.append(take())
    return seconds


def timed(take: Take, steps: int) -> tuple[list[float], list[str]]:
    """Seconds of ``steps`` steps in which nothing was compiled, and what was compiled in others between them.

    Raises:
        RuntimeError: as many others came, so that nothing can be said of a step.
    """
    seconds: list[float] = []
    others = 0
    with compilations() as compiled:
        while len(seconds) < steps and (len(seconds) < LEAST_TIMED or sum(seconds) < TIMED_SECONDS):
            known, spent = len(compiled), take()
            if len(compiled) == known:
                seconds.append(spent)
                continue
            others += 1
            if others == steps:
                raise RuntimeError(f"kernels were compiled in {others} steps after the warm-up: {sorted({*compiled})}")
    return seconds, compiled


def decode(take: Take, steps: int) -> Decoded:
    """Run untimed steps, then ``steps`` timed ones."""
    untimed = warm_up(take)
    return Decoded(untimed, *timed(take, steps))
