"""What vLLM calls when it loads its general plug-ins."""

from __future__ import annotations

import logging
from functools import cache

BACKEND_NAME = "FUSED_TURBOQUANT"

_logger = logging.getLogger(__name__)


@cache
def register() -> None:
    """Say once in each process that the attention backend ``FUSED_TURBOQUANT`` is not there yet.

    vLLM itself is left as it is and keeps running; calling again does nothing. Nothing is imported and no device is
    touched.
    """
    _logger.warning(
        "turboquant-vllm registers no attention backend yet: %s cannot be chosen, and vLLM runs unchanged. "
        "Uninstall turboquant-vllm to silence this message.",
        BACKEND_NAME,
    )
