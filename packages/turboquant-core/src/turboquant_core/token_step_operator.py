"""A provider's ``add_tokens`` as a custom operator, as :mod:`turboquant_core.operators` makes the other operations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from .provider import Attended, Gathered
from .token_step import TokenStepProvider

SCHEMA = (
    "add_tokens(Tensor(a!) out, Tensor(b!) lse, Tensor query, Tensor[] keys, Tensor[] values, Tensor? center, "
    "float scaling, float? softcap, Tensor? sinks, Tensor? visible, str provider) -> ()"
)


def _add_tokens(
    providers: Mapping[str, TokenStepProvider],
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    center: Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
    visible: Tensor | None,
    provider: str,
) -> None:
    exact = [Gathered(*run) for run in zip(keys, values, strict=True)]
    providers[provider].add_tokens(
        Attended(out, lse),
        query,
        exact,
        center=center,
        scaling=scaling,
        softcap=softcap,
        sinks=sinks,
        visible=visible,
    )


class TokenStepOperator:
    """``torch.ops.<namespace>.add_tokens``, which writes ``out`` and ``lse`` in place.

    Args:
        namespace: of :class:`turboquant_core.operators.Operators`, which has to be made first.
        providers: who computes, by name; must have the name when a graph runs.
    """

    def __init__(self, namespace: str, providers: Mapping[str, TokenStepProvider]) -> None:
        self._library = torch.library.Library(namespace, "FRAGMENT")
        self._library.define(SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
        self._library.impl("add_tokens", partial(_add_tokens, providers), "CompositeExplicitAutograd")
        torch.library.register_fake(f"{namespace}::add_tokens", lambda *arguments: None, lib=self._library)
        self._add_tokens = getattr(torch.ops, namespace).add_tokens.default

    def add_tokens(
        self,
        provider: str,
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
        """See :meth:`turboquant_core.token_step.TokenStepProvider.add_tokens`."""
        keys, values = ([run[i] for run in exact] for i in (0, 1))
        self._add_tokens(*part, query, keys, values, center, scaling, softcap, sinks, visible, provider)
        return part
