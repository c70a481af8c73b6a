"""Conditions that hold on the device, checked without a word to the host where it would have to wait."""

from __future__ import annotations

import torch
from torch import Tensor


def require(condition: Tensor, message: str) -> None:
    """Raise ``ValueError`` unless the bool scalar ``condition`` holds; off the CPU, stop the device with ``message``.

    A device is not waited for, so that a CUDA graph may record the check: the error comes with a later operation, and
    the process has to start again, as after any assertion on a device.
    """
    if condition.device.type != "cpu":
        torch._assert_async(condition, message)
    elif not bool(condition):
        raise ValueError(message)
