"""What the plug-in raises on purpose, all of it before weights load unless the message says otherwise."""

from __future__ import annotations

from turboquant_core import TurboQuantError


class OptionError(TurboQuantError, ValueError):
    """An option is unknown or outside its values; the message names the ones that are allowed."""


class UnsupportedError(TurboQuantError, NotImplementedError):
    """A layer, a feature or a vLLM that packed pages do not serve; the message says what to do instead."""
