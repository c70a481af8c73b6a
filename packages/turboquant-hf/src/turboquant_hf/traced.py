"""What stands for a layer's keys or values while a graph is traced: a plain object.

A tensor subclass that holds more than tensors cannot be made there. Only the attention functions and
``scaled_dot_product_attention`` use its pages; anything else that a model does to it meets decoded keys or values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .handle import Kind, PackedTensor, StepPast


class TracedTensor:
    """Keys or values ``[batch, kv_heads, length, head_dim]`` of a packed layer; see the module."""

    def __init__(self, step: StepPast, kind: Kind) -> None:
        self.step, self.kind = step, kind
        self.shape = torch.Size(step.shape(kind))
        self.dtype, self.device, self.ndim = step.dtype, step.past.device, 4

    def dense(self) -> Tensor:
        """The decoded tensor."""
        self.step.count_decoded("keys or values that the model changes before attention")
        return self.step.decoded.keys if self.kind == "keys" else self.step.decoded.values

    def __getattr__(self, name: str) -> Any:
        return getattr(self.dense(), name)

    def __getitem__(self, index: Any) -> Tensor:
        return self.dense()[index]

    def __add__(self, other: Any) -> Any:
        return self.dense() + other

    def __mul__(self, other: Any) -> Any:
        return self.dense() * other

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            # Late, because the intercepted call needs this class.
            from .intercept import intercepted_attention

            return intercepted_attention(*args, **(kwargs or {}))
        args, kwargs = _densely(args), {name: _densely(value) for name, value in (kwargs or {}).items()}
        return func(*args, **kwargs)


def _densely(value: Any) -> Any:
    if isinstance(value, TracedTensor):
        return value.dense()
    return type(value)(_densely(part) for part in value) if isinstance(value, tuple | list) else value


def packed_pair(key: Any, value: Any) -> StepPast | None:
    """The past that ``key`` and ``value`` both stand for; None when they are ordinary tensors."""
    handles = (PackedTensor, TracedTensor)
    if isinstance(key, handles) and isinstance(value, handles) and key.step is value.step:
        return key.step
    return None
