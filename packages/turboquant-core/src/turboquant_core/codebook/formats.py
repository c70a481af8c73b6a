"""The packed format's codebooks: levels that a GPU produces without a table in memory."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from ..integers import integer_of
from ..layout import FORMS, WIDTHS, Form
from .codebook import Codebook, mirrored
from .density import Gaussian, mean_squared_error


@dataclass(frozen=True, slots=True)
class Int8Levels:
    """Levels ``+-(q + 1/2) * step``: ``q`` ascending integers of the upper half, below 128."""

    q: tuple[int, ...]
    step: float

    def levels(self) -> tuple[float, ...]:
        """All levels, ascending."""
        return mirrored((q + 0.5) * self.step for q in self.q)


@dataclass(frozen=True, slots=True)
class CubicLevels:
    """Levels ``step * h * (h * h + c)`` with ``h = code - (2**bits - 1) / 2``."""

    bits: int
    c: float
    step: float

    def levels(self) -> tuple[float, ...]:
        """All levels, ascending."""
        middle = ((1 << self.bits) - 1) / 2
        h = [code - middle for code in range(1 << self.bits)]
        return tuple(self.step * x * (x * x + self.c) for x in h)


@cache
def _data() -> dict[str, dict[str, Any]]:
    return dict(json.loads(files(__package__).joinpath("data/format.json").read_text("utf-8")))


def format_constants(form: Form, bits: int) -> Int8Levels | CubicLevels:
    """The constants of a form, as a kernel needs them.

    Raises:
        ValueError: unknown form or bits.
    """
    if form not in FORMS:
        raise ValueError(f"form is {form!r}; the format has {FORMS}: choose one of them")
    bits = integer_of(bits, "bits", WIDTHS, what="codes of the format have")
    constants = _data()[form][str(bits)]
    if form == "int8":
        return Int8Levels(tuple(constants["q"]), constants["step"])
    return CubicLevels(bits, constants["c"], constants["step"])


def format_codebook(form: Form, bits: int) -> Codebook:
    """The format's levels and their mean squared error on N(0, 1).

    Raises:
        ValueError: unknown form or bits.
    """
    return _codebook(format_constants(form, bits))


@cache
def _codebook(constants: Int8Levels | CubicLevels) -> Codebook:
    levels = constants.levels()
    return Codebook(levels, mean_squared_error(levels, Gaussian()))
