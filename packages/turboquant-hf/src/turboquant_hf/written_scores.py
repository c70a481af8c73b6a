"""Attention that a model writes out: a product with keys, a softmax, a product with values.

The scores are a tensor that waits. When the values come, everything between the products is known, and packed attention
computes all of it at once. An operation that packed attention lacks makes the scores from decoded keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .fused import fused_attention, unfit_query
from .handle import PackedTensor, StepPast
from .operands import Operand, resolved
from .reasons import name_of, written_out
from .visibility import Visibility

_PRODUCTS = {"matmul", "bmm"}


@dataclass(frozen=True, slots=True)
class Formula:
    """What was done to scores so far.

    Attributes:
        keys: that the query was multiplied with.
        query: ``[batch, q_heads, q_len, head_dim]``, or with the first two axes as one.
        scaling: multiplier.
        softcap: ``c`` in ``c * tanh(score / c)``; None for none.
        is_capping: ``tanh`` was taken, its multiplier has not come.
        mask: None, bool (True is visible) or added.
        is_softmax: the softmax was taken.
        versions: of query and mask when they were seen.
        steps: every function with its other arguments, to be done over on decoded keys.
    """

    keys: Operand
    query: Tensor
    scaling: float = 1.0
    softcap: float | None = None
    is_capping: bool = False
    mask: Tensor | None = None
    is_softmax: bool = False
    versions: tuple[int, ...] = ()
    steps: tuple[Callable[[Tensor], Tensor], ...] = ()

    @property
    def step(self) -> StepPast:
        """The past."""
        return self.keys.handle.step  # type: ignore[no-any-return]

    def check(self) -> None:
        """Raise ``RuntimeError`` when query or mask are no longer what they were when the model used them."""
        if self.versions != _versions(self.query, self.mask):
            raise RuntimeError(
                "the query or the mask of an attention was changed in place after its scores were made, and packed "
                "attention computes them later: change a copy instead"
            )

    @property
    def takes_numbers(self) -> bool:
        """Whether a multiplier is one of the scores, and not of something that was made of them."""
        return self.mask is None and not self.is_softmax


def _versions(*tensors: Tensor | None) -> tuple[int, ...]:
    """Changes so far; those of inference tensors cannot be seen."""
    return tuple(0 if x is None or x.is_inference() else x._version for x in tensors)


class WrittenScores(Tensor):
    """Scores, or their softmax, ``[batch, q_heads, q_len, length]`` or with the first two axes as one; see the module.

    A tensor, because a model may return it; its memory is only taken when somebody looks.
    """

    formula: Formula
    _dense: Tensor | None

    @staticmethod
    def __new__(cls, formula: Formula, shape: tuple[int, ...], dtype: torch.dtype) -> WrittenScores:
        self: WrittenScores = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=formula.query.device)
        self.formula, self._dense = formula, None
        return self

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"WrittenScores(shape={tuple(self.shape)}, dtype={self.dtype})"

    def then(self, step: Callable[[Tensor], Tensor], **changes: Any) -> WrittenScores:
        """The scores after one more function; shape and dtype are among ``changes`` when they differ."""
        shape, dtype = changes.pop("shape", self.shape), changes.pop("dtype", self.dtype)
        return WrittenScores(replace(self.formula, steps=(*self.formula.steps, step), **changes), shape, dtype)

    def dense(self, doing: str) -> Tensor:
        """The scores, from decoded keys; ``doing`` is why."""
        if self._dense is None:
            formula = self.formula
            formula.step.count_decoded(doing)
            formula.check()
            scores = torch.matmul(formula.query, formula.keys.dense())
            for step in formula.steps:
                scores = step(scores)
            self._dense = scores
        return self._dense

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        own = args[0] if args and isinstance(args[0], cls) else None
        if own is not None and own._dense is None:
            transition = TRANSITIONS.get(name_of(func))
            found = None if transition is None else transition(own, *args[1:], **kwargs)
            if found is not None:
                return found
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        def decode(value: Any) -> Any:
            if isinstance(value, Operand):
                return value.dense(name_of(func))
            if isinstance(value, PackedTensor):
                value.step.count_decoded(written_out(name_of(func)))
                return value.dense()
            return value.dense(written_out(name_of(func))) if isinstance(value, WrittenScores) else value

        return func(*tree_map(decode, args), **tree_map(decode, kwargs or {}))


def scores_of(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> WrittenScores | None:
    """The scores that ``func`` gives when it multiplies a query with packed keys; None when it does anything else."""
    if name_of(func) not in _PRODUCTS or kwargs or len(args) != 2:
        return None
    query, keys = args
    if type(query) is not Tensor or not isinstance(keys, Operand) or not keys.transposed:
        return None
    fits = query.dim() == keys.dim() and query.shape[:-2] == keys.shape[:-2] and query.shape[-1] == keys.shape[-2]
    is_plain = fits and query.dtype == keys.dtype and not torch.is_autocast_enabled(query.device.type)
    if not is_plain or keys.handle.kind != "keys":
        return None
    formula = Formula(keys, query, versions=_versions(query, None))
    return WrittenScores(formula, (*query.shape[:-1], keys.shape[-1]), query.dtype)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _multiplied(scores: WrittenScores, other: Any) -> WrittenScores | None:
    formula = scores.formula
    if not _number(other) or not formula.takes_numbers:
        return None
    scaling = formula.scaling * other
    if formula.is_capping:
        return scores.then(lambda x: x * other, scaling=scaling, softcap=float(other), is_capping=False)
    return None if formula.softcap else scores.then(lambda x: x * other, scaling=scaling)


def _divided(scores: WrittenScores, other: Any) -> WrittenScores | None:
    formula = scores.formula
    is_scaling = _number(other) and other and formula.takes_numbers and not formula.is_capping and not formula.softcap
    return scores.then(lambda x: x / other, scaling=formula.scaling / other) if is_scaling else None


def _capped(scores: WrittenScores) -> WrittenScores | None:
    formula = scores.formula
    can = formula.takes_numbers and not formula.is_capping and not formula.softcap
    return scores.then(torch.tanh, is_capping=True) if can else None


def _masked(scores: WrittenScores, mask: Any) -> WrittenScores | None:
    formula = scores.formula
    if not isinstance(mask, Tensor) or not formula.takes_numbers or formula.is_capping or mask.dim() != 4:
        return None
    if scores.dim() != 4 or torch.broadcast_shapes(mask.shape, scores.shape) != scores.shape:
        return None
    dtype = torch.promote_types(scores.dtype, mask.dtype)
    return scores.then(lambda x: x + mask, mask=mask, versions=_versions(formula.query, mask), dtype=dtype)


def _softmax(scores: WrittenScores, *args: Any, **kwargs: Any) -> WrittenScores | None:
    dim = args[0] if args else kwargs.get("dim")
    formula = scores.formula
    if dim is None or dim % scores.dim() != scores.dim() - 1 or formula.is_softmax or formula.is_capping:
        return None
    # F.softmax has an argument that it does not use between these.
    dtype = kwargs.get("dtype") or next((arg for arg in args[1:] if isinstance(arg, torch.dtype)), None)
    return scores.then(lambda x: torch.softmax(x, -1, dtype=dtype), is_softmax=True, dtype=dtype or scores.dtype)


def _dropout(scores: WrittenScores, p: float = 0.5, training: bool = True, *_: Any, **kwargs: Any) -> Any:
    return scores if not p or not kwargs.get("train", training) else None


def _cast(scores: WrittenScores, *args: Any, **kwargs: Any) -> WrittenScores | None:
    if len(args) != 1 or not isinstance(args[0], torch.dtype) or kwargs:
        return None
    return scores.then(lambda x: x.to(args[0]), dtype=args[0])


def _as_float(scores: WrittenScores) -> WrittenScores | None:
    return _cast(scores, torch.float32)


def _cast_as(scores: WrittenScores, other: Tensor) -> WrittenScores | None:
    return _cast(scores, other.dtype)


def _reshaped(scores: WrittenScores, *sizes: Any) -> WrittenScores | None:
    given = tuple(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
    wanted = resolved(given, scores.shape)
    batch, heads = scores.formula.keys.handle.shape[:2]
    if wanted in ((batch, heads, *scores.shape[-2:]), (batch * heads, *scores.shape[-2:])):
        return scores.then(lambda x: x.reshape(wanted), shape=wanted)
    return None


def _times_values(scores: WrittenScores, values: Any) -> Tensor | None:
    formula, step = scores.formula, scores.formula.step
    own = values if isinstance(values, Operand) else Operand(values) if isinstance(values, PackedTensor) else None
    if own is None or not formula.is_softmax or own.transposed or own.handle.step is not step:
        return None
    handle, flat = own.handle, scores.dim() == 3
    if (handle.kind, handle.repeats, own.flat, own.dtype) != (
        "values", formula.keys.handle.repeats, flat, scores.dtype,
    ):  # fmt: skip
        return None
    return _attended(scores, own)


def _attended(scores: WrittenScores, values: Operand) -> Tensor:
    """``scores`` times ``values``: packed attention, or the products over decoded keys and values."""
    # Late, because the intercepted call knows the handles.
    from .intercept import readable

    formula, step = scores.formula, scores.formula.step
    # A query that was only cast up for the product.
    query = formula.query.reshape(*formula.keys.handle.shape[:2], *formula.query.shape[-2:]).to(step.dtype)
    found = unfit_query(step, query, needs_offset=formula.softcap is not None)
    visibility = found or readable(step, query, formula.mask, 0.0, is_causal=False)
    if not isinstance(visibility, Visibility):
        reason = written_out(visibility)
        return torch.matmul(scores.dense(reason), values.dense())
    formula.check()
    step.counters.count("intercepted")
    out = fused_attention(step, query, visibility, scaling=formula.scaling, softcap=formula.softcap).to(scores.dtype)
    return out.flatten(0, 1) if values.flat else out


TRANSITIONS: dict[str, Callable[..., Any]] = {
    "mul": _multiplied,
    "rmul": _multiplied,
    "div": _divided,
    "truediv": _divided,
    "tanh": _capped,
    "add": _masked,
    "radd": _masked,
    "softmax": _softmax,
    "dropout": _dropout,
    "to": _cast,
    "float": _as_float,
    "type_as": _cast_as,
    "view": _reshaped,
    "reshape": _reshaped,
    "matmul": _times_values,
    "bmm": _times_values,
}
"""Functions after which scores still wait, by name, and the product that ends the waiting; None: decode."""
