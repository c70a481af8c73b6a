"""A tensor that stands for a layer's keys or values while they stay packed.

It has the dense shape, dtype and device. The registered attention function and ``scaled_dot_product_attention`` use the
packed pages; any other operation decodes first, is right, slower, and counted.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from turboquant_core import Gathered
from turboquant_core.split_past import SplitPast

from .counters import LayerCounters
from .head_groups import head_groups, sizes_of
from .operands import STARTS
from .reasons import LATENT, changed, name_of

Kind: TypeAlias = Literal["keys", "values"]


class StepPast:
    """A layer's packed past during one forward, shared by its key and its value handle.

    Args:
        past: the pages as they are now; kept even when the cache moves or grows meanwhile.
        dtype: of what is stored in full precision, and of the dense tensors that the handles stand for.
        counters: where the layer counts its calls.
        length: how many of the last tokens the handles show; None for all.
        window: keys that a query sees, itself included; None for all.
        padding_is_known: whether the layer was told where its sequences begin.

    Attributes:
        stored: ``dtype`` as it was given; ``dtype`` may become another one, that of the queries.
        tiles: how often the handles show all heads, one round after the other.
    """

    def __init__(
        self,
        past: SplitPast,
        dtype: torch.dtype,
        counters: LayerCounters,
        *,
        length: int | None = None,
        window: int | None = None,
        padding_is_known: bool = True,
    ) -> None:
        self.past = past
        self.dtype = self.stored = dtype
        self.counters = counters
        self.length = past.length if length is None else length
        self.window = window
        self.padding_is_known = padding_is_known
        self.tiles = 1
        self._is_counted = False
        self._tiled: dict[int, StepPast] = {}
        self._decoded: Gathered | None = None

    @property
    def hidden(self) -> int:
        """Tokens of the past before the first that the handles show."""
        return self.past.length - self.length

    def count_decoded(self, reason: str) -> None:
        """Count this forward as decoded; only its first reason counts, a model's attention has several operations."""
        if not self._is_counted:
            self._is_counted = True
            self.counters.count("decoded", reason)

    @property
    def has_room(self) -> bool:
        """Whether the handles show room behind the last token, which attention must not see."""
        return not isinstance(self.past.end, int)

    @property
    def decoded(self) -> Gathered:
        """Dense keys and values, decoded once however many operations ask."""
        if self._decoded is None:
            exact = self.past.read(self.hidden, self.past.length, self.stored)
            # The strides that the handles have promised: models call view().
            self._decoded = Gathered(*(x.to(self.dtype).contiguous() for x in exact))
        return self._decoded

    def tiled(self, tiles: int) -> StepPast:
        """The same past with all heads ``tiles`` times; the same object for keys and values."""
        if tiles not in self._tiled:
            other = copy.copy(self)
            other.tiles, other._tiled = self.tiles * tiles, {}
            self._tiled[tiles] = other
        return self._tiled[tiles]

    def shape(self, kind: Kind, repeats: int = 1) -> tuple[int, int, int, int]:
        """Of the dense keys or values, each head ``repeats`` times."""
        layout = self.past.codec.layout
        head_dim = layout.key.head_dim if kind == "keys" else layout.value.head_dim
        return self.past.batch, layout.kv_heads * self.tiles * repeats, self.length, head_dim

    def dense(self, kind: Kind, repeats: int = 1) -> Tensor:
        """Decoded keys or values, each head ``repeats`` times."""
        decoded = self.decoded.keys if kind == "keys" else self.decoded.values
        if self.tiles > 1:
            decoded = decoded.repeat(1, self.tiles, 1, 1)
        return decoded if repeats == 1 else decoded.repeat_interleave(repeats, 1)


class PackedTensor(Tensor):
    """Keys or values ``[batch, kv_heads * repeats, length, head_dim]`` of a packed layer; see the module."""

    step: StepPast
    kind: Kind
    repeats: int

    @staticmethod
    def __new__(cls, step: StepPast, kind: Kind, repeats: int = 1) -> PackedTensor:
        self: PackedTensor = Tensor._make_wrapper_subclass(
            cls, step.shape(kind, repeats), dtype=step.dtype, device=step.past.device
        )
        self.step, self.kind, self.repeats = step, kind, repeats
        return self

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"PackedTensor({self.kind}, shape={tuple(self.shape)}, bits packed, dtype={self.dtype})"

    def dense(self) -> Tensor:
        """The decoded tensor."""
        return self.step.dense(self.kind, self.repeats)

    def repeated(self, repeats: int) -> PackedTensor:
        """Every head ``repeats`` times."""
        return PackedTensor(self.step, self.kind, self.repeats * repeats)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        keep = _KEPT.get(func)
        if keep is not None:
            packed = keep(*args, **(kwargs or {}))
            if packed is not None:
                return packed
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        def decode(value: Any) -> Any:
            if not isinstance(value, PackedTensor):
                return value
            value.step.count_decoded(changed(name_of(func)))
            return value.dense()

        return func(*tree_map(decode, args), **tree_map(decode, kwargs or {}))


def _attended(*args: Any, **kwargs: Any) -> Tensor:
    # Late, because the intercepted call needs the handle's class.
    from .intercept import intercepted_attention

    return intercepted_attention(*args, **kwargs)


def _tiled(handle: PackedTensor, *repeats: Any) -> PackedTensor | None:
    """What ``handle.repeat()`` gives, if it repeats the axis of heads alone."""
    sizes = sizes_of(repeats)
    is_of_heads = len(sizes) == 4 and (sizes[0], *sizes[2:]) == (1, 1, 1) and sizes[1] > 0 and handle.repeats == 1
    return PackedTensor(handle.step.tiled(sizes[1]), handle.kind) if is_of_heads else None


def _projected(vectors: Any, *_: Any) -> None:
    """Say what a linear layer over cached vectors is; it decodes."""
    if isinstance(vectors, PackedTensor):
        vectors.step.count_decoded(LATENT)


_KEPT: dict[Any, Callable[..., Any]] = {
    F.scaled_dot_product_attention: _attended,
    Tensor.__getitem__: head_groups,
    Tensor.repeat: _tiled,
    F.linear: _projected,
    **STARTS,
}
"""Functions of a handle that may do without decoding: None when this call does not."""
