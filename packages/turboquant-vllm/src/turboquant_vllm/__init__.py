"""A vLLM plug-in for the TurboQuant packed KV cache. This version registers no attention backend yet.

vLLM calls :func:`register` in each of its processes, through the entry-point group ``vllm.general_plugins``.
"""

from __future__ import annotations

from ._version import __version__
from .plugin import register

__all__ = ["__version__", "register"]
