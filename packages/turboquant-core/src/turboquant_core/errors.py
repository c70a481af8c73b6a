"""The exceptions that turboquant raises on purpose."""

from __future__ import annotations


class TurboQuantError(Exception):
    """Base class of every error that turboquant raises on purpose."""


class LayoutError(TurboQuantError, ValueError):
    """A packed layout cannot describe what was asked for (bits, head_dim, page size, version)."""


class ProviderError(TurboQuantError, RuntimeError):
    """No kernel provider, or not the named one, can do what was asked for."""
