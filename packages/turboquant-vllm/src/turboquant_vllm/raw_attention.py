"""Attention over keys and values as they came: FlashAttention on a GPU, PyTorch on a CPU."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from turboquant_core import Attended

from .errors import UnsupportedError


@dataclass(frozen=True, slots=True)
class Scoring:
    """What a layer does to its scores.

    Attributes:
        scaling: multiplier of Q K^T.
        window: keys a query sees, itself included; None for all.
        softcap: ``c`` of ``c * tanh(score / c)``; None for none.
    """

    scaling: float
    window: int | None
    softcap: float | None


@dataclass(frozen=True, slots=True)
class Bounds:
    """Sequences that lie one after the other.

    Attributes:
        starts: int32 ``[batch + 1]`` on the device.
        host: the same numbers.
    """

    starts: Tensor
    host: tuple[int, ...]

    @classmethod
    def single(cls, length: int, device: torch.device) -> Bounds:
        """One sequence."""
        return cls(torch.tensor([0, length], dtype=torch.int32, device=device), (0, length))

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(stop - start for start, stop in itertools.pairwise(self.host))


class RawAttention(Protocol):
    """Attention of each sequence's queries over its keys; the last query stands at the last key."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        queries: Bounds,
        keys: Bounds,
        scoring: Scoring,
        *,
        causal: bool,
        out: Tensor | None = None,
    ) -> Attended:
        """Attend.

        Args:
            query: ``[tokens, q_heads, head_dim]``.
            key: ``[keys, kv_heads, head_dim]``.
            value: ``[keys, kv_heads, head_dim]``.
            queries: which queries belong to which sequence.
            keys: which keys do.
            scoring: of the layer; a window needs ``causal``.
            causal: whether a query sees only the keys up to its own position.
            out: written and returned when given.
        """
        ...


def flash_attention(head_dim: int) -> RawAttention:
    """vLLM's FlashAttention.

    Raises:
        UnsupportedError: it is not built for this device.
    """
    from vllm.v1.attention.backends import fa_utils

    version = fa_utils.get_flash_attn_version(head_size=head_dim)
    if not fa_utils.is_flash_attn_varlen_func_available() or version is None:
        raise UnsupportedError(
            f"prompts need vLLM's FlashAttention, which this vLLM does not have for this device and head_dim {head_dim}"
        )

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        queries: Bounds,
        keys: Bounds,
        scoring: Scoring,
        *,
        causal: bool,
        out: Tensor | None = None,
    ) -> Attended:
        result, lse = fa_utils.flash_attn_varlen_func(
            q=query,
            k=key,
            v=value,
            max_seqlen_q=queries.longest,
            cu_seqlens_q=queries.starts,
            max_seqlen_k=keys.longest,
            cu_seqlens_k=keys.starts,
            softmax_scale=scoring.scaling,
            causal=causal,
            window_size=[-1, -1] if scoring.window is None or not causal else [scoring.window - 1, 0],
            softcap=scoring.softcap or 0.0,
            return_softmax_lse=True,
            out=out,
            fa_version=version,
        )
        return Attended(result, lse.transpose(0, 1))

    return attention


def torch_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: Bounds,
    keys: Bounds,
    scoring: Scoring,
    *,
    causal: bool,
    out: Tensor | None = None,
) -> Attended:
    """See :class:`RawAttention`; float32, one sequence at a time."""
    out = torch.empty_like(query) if out is None else out
    lse = query.new_empty(query.shape[:2], dtype=torch.float32)
    spans = zip(itertools.pairwise(queries.host), itertools.pairwise(keys.host), strict=True)
    for (first, last), (start, stop) in spans:
        result, lse[first:last] = _attend_one(query[first:last], key[start:stop], value[start:stop], scoring, causal)
        out[first:last] = result.to(out.dtype)
    return Attended(out, lse)


def _attend_one(query: Tensor, key: Tensor, value: Tensor, scoring: Scoring, causal: bool) -> tuple[Tensor, Tensor]:
    grouped = query.float().unflatten(1, (key.shape[1], -1))
    scores = scoring.scaling * torch.einsum("qhgd,khd->qhgk", grouped, key.float())
    if scoring.softcap is not None:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    if causal:
        hidden = ~_visible(query.shape[0], key.shape[0], scoring.window, query.device)
        scores = scores.masked_fill(hidden[:, None, None], -torch.inf)
    lse = torch.logsumexp(scores, dim=-1)
    out = torch.einsum("qhgk,khd->qhgd", torch.exp(scores - lse.unsqueeze(-1)), value.float())
    return out.flatten(1, 2), lse.flatten(1, 2)


def _visible(q_len: int, kv_len: int, window: int | None, device: torch.device) -> Tensor:
    """Bool ``[q_len, kv_len]``; the last query stands at the last key."""
    position = torch.arange(kv_len - q_len, kv_len, device=device).unsqueeze(1)
    key = torch.arange(kv_len, device=device)
    return (key <= position) & (key > position - (kv_len if window is None else window))
