"""What vLLM calls in each of its processes when it loads its general plug-ins."""

from __future__ import annotations

import logging
import os
from functools import cache
from importlib.util import find_spec

from .compat import ATTENTION_MODULE, CPU_PLATFORM_MODULE, missing
from .importing import when_imported
from .registration import BACKEND_NAME, override_native, register_name

OVERRIDE_VARIABLE = "TURBOQUANT_OVERRIDE_NATIVE"

_logger = logging.getLogger("vllm.turboquant")


@cache
def register() -> None:
    """Make ``FUSED_TURBOQUANT`` an attention backend of this vLLM.

    Calling again does nothing. No device is touched, kernels and attention layers are not imported, and nothing is
    raised: on a vLLM that cannot serve packed pages a warning says why, and vLLM is left as it is. With
    ``TURBOQUANT_OVERRIDE_NATIVE=1`` the ``turboquant_*`` cache types of vLLM are served by this backend too.
    """
    try:
        reason = _register()
    except Exception as error:  # noqa: BLE001 - an exception here would keep every vLLM of this machine from starting
        reason = repr(error)
    if reason is not None:
        _logger.warning("%s is not available, vLLM runs unchanged: %s", BACKEND_NAME, reason)


def _register() -> str | None:
    if find_spec("vllm") is None:
        return "vLLM is not installed"
    reason = missing()
    if reason is not None:
        return f"this vLLM is too old or too new for it, {reason}"
    from .hooks import wrap_attention, wrap_cpu_platform

    register_name()
    if _takes_over():
        override_native()
    when_imported(ATTENTION_MODULE, wrap_attention)
    when_imported(CPU_PLATFORM_MODULE, wrap_cpu_platform)
    return None


def _takes_over() -> bool:
    wanted = os.environ.get(OVERRIDE_VARIABLE) or "0"
    if wanted not in ("0", "1"):
        # Nothing may be raised here, and who did not ask for this backend must not lose vLLM's own.
        told = "%s is %r; it must be 0 or 1: vLLM's own turboquant_* cache types stay as they are"
        _logger.warning(told, OVERRIDE_VARIABLE, wanted)
    return wanted == "1"
