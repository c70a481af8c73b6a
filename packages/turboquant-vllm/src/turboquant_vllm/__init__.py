"""A vLLM plug-in for the TurboQuant packed KV cache."""

from __future__ import annotations

from ._version import __version__

__all__ = ["__version__"]
