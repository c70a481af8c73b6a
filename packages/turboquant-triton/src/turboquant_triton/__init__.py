"""Fused Triton kernels for the TurboQuant packed KV cache, found by turboquant-core through an entry point."""

from __future__ import annotations

from ._version import __version__

__all__ = ["__version__"]
