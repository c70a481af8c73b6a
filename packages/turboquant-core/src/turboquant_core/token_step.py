"""Who may add exact tokens to attention over packed ones in an operation of its own."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from .dense_step import add_tokens
from .provider import Attended, Gathered, KernelProvider


@runtime_checkable
class TokenStepProvider(Protocol):
    """What a :class:`KernelProvider` may have besides, so that a decode step takes few launches."""

    def add_tokens(
        self,
        part: Attended,
        query: Tensor,
        exact: Sequence[Gathered],
        *,
        center: Tensor | None,
        scaling: float,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Attended:
        """Add to ``part``, in place, attention over one or two runs of tokens of which every query sees all.

        Args:
            part: of the same queries, contiguous, from :meth:`KernelProvider.attend`: ``out`` ``[batch, q_heads, 1,
                value_head_dim]``, lse float32 ``[batch, q_heads, 1]``.
            query: float ``[batch, q_heads, 1, head_dim]``; ``q_heads`` a multiple of ``kv_heads``.
            exact: keys ``[batch, kv_heads, tokens, head_dim]`` and values ``[batch, kv_heads, tokens, value_head_dim]``
                of each run, all of one dtype; strided views are read as they are.
            center: float32 ``[kv_heads, head_dim]``, which packed scores lack and exact keys must lose; or None.
            scaling: multiplier of ``Q K^T``.
            softcap: ``c`` in ``c * tanh(score / c)``; None for none.
            sinks: float ``[q_heads]``, logits that only enlarge the softmax denominator; ``part`` has none.

        Returns:
            ``part``.

        Raises:
            ValueError: shapes, dtypes or devices do not fit one another.
        """
        ...


@cache
def _has_step(kind: type) -> bool:
    # isinstance() asks each time, at a few microseconds a layer.
    return issubclass(kind, TokenStepProvider)


def attend_tokens(
    provider: KernelProvider,
    part: Attended,
    query: Tensor,
    exact: Sequence[Gathered],
    *,
    center: Tensor | None,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Attended:
    """:meth:`TokenStepProvider.add_tokens` of ``provider``, in PyTorch where it has none; ``part`` is given up."""
    if _has_step(type(provider)) and not torch.compiler.is_compiling():
        step: TokenStepProvider = provider  # type: ignore[assignment]
        return step.add_tokens(part, query, exact, center=center, scaling=scaling, softcap=softcap, sinks=sinks)
    keys, values = joined(exact, center)
    return add_tokens(part, query, keys, values, scaling=scaling, softcap=softcap, sinks=sinks)


def joined(exact: Sequence[Gathered], center: Tensor | None) -> Gathered:
    """All runs one after the other, the keys without ``center``; see :meth:`TokenStepProvider.add_tokens`."""
    keys, values = exact[0] if len(exact) == 1 else (torch.cat(pair, 2) for pair in zip(*exact, strict=True))
    # Packed scores lack the centre, and both parts must lack it to be merged.
    return Gathered(keys if center is None else keys.float() - center.unsqueeze(1), values)
