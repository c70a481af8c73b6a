"""A vLLM plug-in: ``vllm serve MODEL --attention-backend FUSED_TURBOQUANT`` keeps keys and values in 2 to 4 bits.

vLLM calls :func:`register` in each of its processes, through the entry-point group ``vllm.general_plugins``. Importing
this package imports neither torch nor vLLM.
"""

from __future__ import annotations

from ._version import __version__
from .plugin import register

__all__ = ["__version__", "register"]
