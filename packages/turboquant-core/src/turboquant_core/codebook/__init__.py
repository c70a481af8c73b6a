"""Codebooks for a coordinate of unit variance: the textbook's and the format's."""

from __future__ import annotations

from .codebook import Codebook
from .formats import CubicLevels, Int8Levels, format_codebook, format_constants
from .textbook import lloyd_max

__all__ = ["Codebook", "CubicLevels", "Int8Levels", "format_codebook", "format_constants", "lloyd_max"]
