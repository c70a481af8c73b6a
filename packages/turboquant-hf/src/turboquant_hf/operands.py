"""A handle as a factor of a matrix product, where a model writes its attention out: transposed, flat, another dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .dense_operators import DenseOperators
from .head_groups import Handle, sizes_of
from .reasons import name_of, written_out


class Operand(DenseOperators):
    """Keys or values that a model is about to multiply with; anything but the product decodes them.

    Args:
        handle: keys or values ``[batch, heads, length, head_dim]``.
        transposed: the last two axes are exchanged.
        flat: the first two axes are one.
        dtype: that the model asked for; None for that of the handle.
    """

    def __init__(
        self, handle: Handle, *, transposed: bool = False, flat: bool = False, dtype: torch.dtype | None = None
    ) -> None:
        self.handle, self.transposed, self.flat = handle, transposed, flat
        self.dtype: torch.dtype = dtype or handle.step.dtype
        self.ndim = 3 if flat else 4

    @property
    def shape(self) -> torch.Size:
        """As of the dense tensor."""
        batch, heads, length, head_dim = self.handle.shape
        lead = (batch * heads,) if self.flat else (batch, heads)
        return torch.Size((*lead, head_dim, length) if self.transposed else (*lead, length, head_dim))

    @property
    def device(self) -> torch.device:
        """Of the pages."""
        return self.handle.step.past.device  # type: ignore[no-any-return]

    @property
    def is_plain(self) -> bool:
        """Whether this is the handle, no more and no less."""
        return not self.transposed and not self.flat and self.dtype == self.handle.step.dtype

    def size(self, dim: int | None = None) -> Any:
        """As of a tensor."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """As of a tensor."""
        return self.ndim

    @property
    def mT(self) -> Operand:  # noqa: N802 - the name that tensors have
        """As of a tensor."""
        return self.changed(transposed=not self.transposed)

    def changed(self, **changes: Any) -> Operand:
        """The same handle, seen in another form."""
        own: dict[str, Any] = {"transposed": self.transposed, "flat": self.flat, "dtype": self.dtype}
        return Operand(self.handle, **(own | changes))

    def dense(self, doing: str = "operations of its own") -> Tensor:
        """The decoded tensor, as the model asked for it; ``doing`` is why."""
        self.handle.step.count_decoded(written_out(doing))
        dense = self.handle.dense().to(self.dtype)
        dense = dense.flatten(0, 1) if self.flat else dense
        return dense.transpose(-1, -2) if self.transposed else dense

    def __getitem__(self, index: Any) -> Tensor:
        return self.dense("indexing")[index]

    def __getattr__(self, name: str) -> Any:
        form = FORMS.get(name)
        if form is None:
            return getattr(self.dense(name), name)

        def call(*args: Any, **kwargs: Any) -> Any:
            found = form(self, *args, **kwargs)
            return getattr(self.dense(name), name)(*args, **kwargs) if found is None else found

        return call

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        # Late, because scores are made of operands.
        from .written_scores import scores_of

        scores = scores_of(func, args, kwargs or {})
        if scores is not None:
            return scores
        for argument in (*args, *(kwargs or {}).values()):
            if isinstance(argument, Operand):
                argument.handle.step.count_decoded(written_out(name_of(func)))
        return super().__torch_function__(func, types, args, kwargs)


def _transposed(operand: Operand, first: int, second: int) -> Operand | None:
    is_last_two = {first % operand.ndim, second % operand.ndim} == {operand.ndim - 2, operand.ndim - 1}
    return operand.changed(transposed=not operand.transposed) if is_last_two else None


def _permuted(operand: Operand, *dims: Any) -> Operand | None:
    order = [dim % operand.ndim for dim in sizes_of(dims)]
    last_two_exchanged = [*range(operand.ndim - 2), operand.ndim - 1, operand.ndim - 2]
    return operand.changed(transposed=not operand.transposed) if order == last_two_exchanged else None


def resolved(sizes: tuple[int, ...], shape: torch.Size) -> tuple[int, ...]:
    """``sizes`` of as many elements as ``shape``, with the size that ``-1`` stands for."""
    if sizes.count(-1) != 1:
        return sizes
    known = -torch.Size(sizes).numel()
    return tuple(shape.numel() // known if size == -1 and known else size for size in sizes)


def _reshaped(operand: Operand, *sizes: Any) -> Operand | None:
    wanted = resolved(sizes_of(sizes), operand.shape)
    other = operand.changed(flat=not operand.flat)
    if wanted == operand.shape:
        return operand
    return other if wanted == other.shape and not operand.transposed else None


def _cast(operand: Operand, *args: Any, **kwargs: Any) -> Operand | None:
    is_dtype = len(args) == 1 and isinstance(args[0], torch.dtype) and not kwargs
    return operand.changed(dtype=args[0]) if is_dtype else None


FORMS: dict[str, Callable[..., Operand | None]] = {
    "transpose": _transposed,
    "permute": _permuted,
    "reshape": _reshaped,
    "view": _reshaped,
    "to": _cast,
    "float": lambda operand: operand.changed(dtype=torch.float32),
    "contiguous": lambda operand: operand,
}
"""Methods of a tensor after which its product can still be computed from pages; None when this call is another one."""


def _start(form: Callable[..., Operand | None]) -> Callable[..., Any]:
    def start(handle: Handle, *args: Any, **kwargs: Any) -> Any:
        found = form(Operand(handle), *args, **kwargs)
        return handle if found is not None and found.is_plain else found

    return start


STARTS: dict[Any, Callable[..., Any]] = {
    **{getattr(Tensor, name): _start(form) for name, form in FORMS.items()},
    torch.transpose: _start(_transposed),
    Tensor.mT.__get__: _start(lambda operand: operand.mT),  # type: ignore[attr-defined]
}
"""What functions of a handle give that keep it packed; None where this call does not."""
