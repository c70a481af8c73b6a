"""Triton's interpreter without two repetitions that take much of its time for kernels like ours; the results are equal.

It replaces the functions of ``triton.language`` in every call of a device function, where once a launch is enough; and
a reduction with a function of ours goes number by number through Python, where it can go slice by slice.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


class OnceALaunch:
    """Calls ``patch`` with the first function of a launch that sees a module; its replacements last until the end."""

    def __init__(self, patch: Callable[[Any], Any]) -> None:
        self.patch = patch
        self.languages: dict[int, frozenset[str]] = {}
        self.done: set[frozenset[str]] = set()

    def __call__(self, function: Any) -> Any:
        """What the interpreter restores when the launch ends; None, which it does not ask for, in calls within one."""
        seen = self.seen_by(function.__globals__)
        if seen in self.done:
            return None
        self.done.add(seen)
        scope = self.patch(function)
        restore = scope.restore

        def end() -> None:
            self.done.clear()
            restore()

        scope.restore = end
        return scope

    def seen_by(self, names: dict[str, Any]) -> frozenset[str]:
        """Which modules of the language a function with these globals sees."""
        if id(names) not in self.languages:
            known = {id(tl): "tl", id(tl.core): "core"}
            self.languages[id(names)] = frozenset(known[id(one)] for one in names.values() if id(one) in known)
        return self.languages[id(names)]


def by_slices(reduce: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """``ReduceOps.generic_reduce`` that combines slices along the axis, in the order in which it combines numbers."""

    @wraps(reduce)
    def combine(self: Any, tensors: tuple[Any, ...]) -> Any:
        if self.axis is None or self.keep_dims or tensors[0].handle.data.ndim < 2:
            return reduce(self, tensors)

        def at(index: int) -> list[Any]:
            return [self.to_tensor(tensor.handle.data.take(index, self.axis), tensor.dtype) for tensor in tensors]

        combined: Any = at(0)
        for index in range(1, tensors[0].handle.data.shape[self.axis]):
            combined = self.combine_fn.fn(*combined, *at(index))
            combined = combined if isinstance(combined, tuple) else (combined,)
        return [self.to_tensor(one.handle.data, tensor.dtype) for one, tensor in zip(combined, tensors, strict=True)]

    return combine


def install() -> None:
    """Change the interpreter of this process."""
    interpreter._patch_lang = OnceALaunch(interpreter._patch_lang)
    interpreter.ReduceOps.generic_reduce = by_slices(interpreter.ReduceOps.generic_reduce)
