"""Python's operators for objects that stand for a tensor without being one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from torch import Tensor

_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul")
_COMPARISONS = ("lt", "le", "gt", "ge")


def densely(value: Any) -> Any:
    """``value`` with the dense tensor in place of every such object, in tuples and lists too."""
    if isinstance(value, DenseOperators):
        return value.dense()
    return type(value)(densely(part) for part in value) if isinstance(value, tuple | list) else value


class DenseOperators(ABC):
    """Attributes, methods, operators and functions are those of the dense tensor."""

    @abstractmethod
    def dense(self) -> Tensor:
        """The tensor."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.dense(), name)

    def __neg__(self) -> Tensor:
        return -self.dense()

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return func(*densely(args), **{name: densely(value) for name, value in (kwargs or {}).items()})


def _forwarded(name: str) -> Callable[..., Any]:
    def operator(self: DenseOperators, other: Any) -> Any:
        return getattr(self.dense(), name)(other)

    return operator


for _name in (*(f"__{name}__" for name in (*_BINARY, *_COMPARISONS)), *(f"__r{name}__" for name in _BINARY)):
    setattr(DenseOperators, _name, _forwarded(_name))
