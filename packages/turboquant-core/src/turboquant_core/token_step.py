"""Who may add exact tokens to attention over packed ones in an operation of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from .dense import attend_dense
from .dense_step import add_tokens
from .merge import merge_attended
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
        visible: Tensor | None = None,
    ) -> Attended:
        """Add to ``part``, in place, attention over one or two runs of exact tokens.

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
            visible: bool ``[batch, tokens of all runs]``, which of them a query sees; None for all. What no query sees
                may be NaN.

        Returns:
            ``part``; where neither it nor ``visible`` shows a token, out 0 and lse ``-inf`` (or the sink).

        Raises:
            ValueError: shapes, dtypes or devices do not fit one another.
        """
        ...


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
    visible: Tensor | None = None,
) -> Attended:
    """:meth:`TokenStepProvider.add_tokens` of ``provider``, in PyTorch where it has none; ``part`` is given up."""
    # isinstance() of a protocol takes a few microseconds a layer.
    step = getattr(provider, "add_tokens", None)
    if step is not None:
        added: Attended = step(
            part, query, exact, center=center, scaling=scaling, softcap=softcap, sinks=sinks, visible=visible
        )
        return added
    keys, values = joined(exact, center)
    if visible is None:
        return add_tokens(part, query, keys, values, scaling=scaling, softcap=softcap, sinks=sinks)
    out, lse = attend_dense(query, keys, values, visible.unsqueeze(1), scaling=scaling, softcap=softcap, sinks=sinks)
    return merge_attended(part, Attended(out.to(part.out.dtype), lse))


def joined(exact: Sequence[Gathered], center: Tensor | None) -> Gathered:
    """All runs one after the other, the keys without ``center``; see :meth:`TokenStepProvider.add_tokens`."""
    keys, values = exact[0] if len(exact) == 1 else (torch.cat(pair, 2) for pair in zip(*exact, strict=True))
    # Packed scores lack the centre, and both parts must lack it to be merged.
    return Gathered(keys if center is None else keys.float() - center.unsqueeze(1), values)
