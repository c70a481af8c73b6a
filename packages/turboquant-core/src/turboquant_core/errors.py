"""The exceptions that turboquant raises on purpose."""

from __future__ import annotations


class TurboQuantError(Exception):
    """Base class of every error that turboquant raises on purpose."""


class LayoutError(TurboQuantError, ValueError):
    """A packed layout cannot describe what was asked for (bits, head_dim, page size, version)."""


class ProviderError(TurboQuantError, RuntimeError):
    """No kernel provider, or not the named one, can do what was asked for."""


OTHER_HEAD_DIM = (
    "vectors of this size stay uncompressed, unless you append zeros to queries, keys and values up to a larger size, "
    "which changes no score (nothing is padded by itself)"
)
"""The way out of a head_dim that has no codes."""
