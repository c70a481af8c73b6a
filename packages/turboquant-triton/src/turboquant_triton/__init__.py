"""Fused Triton kernels for the TurboQuant packed KV cache; turboquant-core finds them by entry point."""

from __future__ import annotations

from ._version import __version__
from .provider import TritonProvider

__all__ = ["TritonProvider", "__version__"]
