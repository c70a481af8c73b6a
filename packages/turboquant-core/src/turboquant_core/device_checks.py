"""Conditions that hold on the device, checked without a word to the host where it would have to wait."""

from __future__ import annotations

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("turboquant_core", "DEF")
_LIBRARY.define(
    "require_before(Tensor(a!) use, Tensor condition, str message) -> ()", tags=(torch.Tag.pt2_compliant_tag,)
)


def require(condition: Tensor, message: str) -> None:
    """Raise ``ValueError`` unless the bool scalar ``condition`` holds; off the CPU, stop the device with ``message``.

    A device is not waited for, so that a CUDA graph may record the check: the error comes with a later operation, and
    the process has to start again, as after any assertion on a device.
    """
    if condition.device.type != "cpu":
        torch._assert_async(condition, message)
    elif not bool(condition):
        raise ValueError(message)


def require_before(use: Tensor, condition: Tensor, message: str) -> None:
    """:func:`require`, in a graph that is traced too; there, whatever reads the fresh tensor ``use`` comes after it."""
    if torch.compiler.is_compiling():
        torch.ops.turboquant_core.require_before(use, condition, message)
    else:
        require(condition, message)


def _require_before(use: Tensor, condition: Tensor, message: str) -> None:
    require(condition, message)


# An operator that declares a write, because a compiler drops assertions that nothing depends on.
_LIBRARY.impl("require_before", _require_before, "CompositeExplicitAutograd")
torch.library.register_fake("turboquant_core::require_before", lambda *arguments: None, lib=_LIBRARY)
