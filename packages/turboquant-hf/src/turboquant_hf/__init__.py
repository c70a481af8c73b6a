"""A packed TurboQuant KV cache for Hugging Face Transformers."""

from __future__ import annotations

from ._version import __version__

__all__ = ["__version__"]
