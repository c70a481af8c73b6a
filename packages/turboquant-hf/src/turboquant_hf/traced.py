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

from .dense_operators import DenseOperators
from .handle import Kind, PackedTensor, StepPast
from .head_groups import HeadGroups, is_new_axis_of_heads
from .reasons import changed


class TracedTensor(DenseOperators):
    """Keys or values ``[batch, kv_heads * repeats, length, head_dim]`` of a packed layer; see the module."""

    def __init__(self, step: StepPast, kind: Kind, repeats: int = 1) -> None:
        self.step, self.kind, self.repeats = step, kind, repeats
        self.shape = torch.Size(step.shape(kind, repeats))
        self.dtype, self.device, self.ndim = step.dtype, step.past.device, 4

    def dense(self) -> Tensor:
        """The decoded tensor."""
        self.step.count_decoded(changed())
        return self.step.dense(self.kind, self.repeats)

    def repeated(self, repeats: int) -> TracedTensor:
        """Every head ``repeats`` times."""
        return TracedTensor(self.step, self.kind, self.repeats * repeats)

    def __getitem__(self, index: Any) -> Any:
        return HeadGroups(self) if is_new_axis_of_heads(index) else self.dense()[index]

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
        return super().__torch_function__(func, types, args, kwargs)


def packed_pair(key: Any, value: Any) -> StepPast | None:
    """The past that ``key`` and ``value`` both stand for; None when they are ordinary tensors."""
    handles = (PackedTensor, TracedTensor)
    if isinstance(key, handles) and isinstance(value, handles) and key.step is value.step:
        return key.step if key.repeats == value.repeats else None
    return None
