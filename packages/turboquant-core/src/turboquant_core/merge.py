"""Attention over a union of keys from attention over its parts, by the log-sum-exp of each."""

from __future__ import annotations

import torch
from torch import Tensor

from .provider import Attended


def merge_attended(first: Attended, second: Attended) -> Attended:
    """Attention over the keys of both parts, which must be disjoint, for the same queries.

    An attention sink (``s_aux``) belongs to one part only, else it counts twice. Outputs are weighted in float32
    (float64 for float64 outputs); a part whose lse is ``-inf`` has no weight, whatever its output holds, NaN included.

    Args:
        first: ``out`` ``[..., value_head_dim]`` and ``lse`` float32 ``[...]``.
        second: the same shapes and dtypes.

    Returns:
        ``out`` in the dtype of the parts, 0 where neither part sees a key, and ``lse`` float32, ``-inf`` there.

    Raises:
        ValueError: shapes or dtypes of the parts differ.
    """
    _check(first, second)
    lse = torch.logaddexp(first.lse, second.lse)
    accumulate = torch.promote_types(first.out.dtype, torch.float32)
    out = _weighted(first, lse, accumulate) + _weighted(second, lse, accumulate)
    return Attended(out.to(first.out.dtype), lse)


def _weighted(part: Attended, lse: Tensor, dtype: torch.dtype) -> Tensor:
    # Without a key the difference may be -inf - -inf, and the output anything.
    weight = torch.exp(part.lse.to(dtype) - lse.to(dtype)).unsqueeze(-1)
    empty = torch.isneginf(part.lse).unsqueeze(-1)
    return torch.where(empty, torch.zeros((), dtype=dtype, device=lse.device), weight * part.out.to(dtype))


def _check(first: Attended, second: Attended) -> None:
    for part in (first, second):
        if part.lse.shape != part.out.shape[:-1] or part.lse.dtype != torch.float32:
            raise ValueError(
                f"lse is {part.lse.dtype} {tuple(part.lse.shape)}; an output of shape {tuple(part.out.shape)} needs "
                f"torch.float32 {tuple(part.out.shape[:-1])}"
            )
    if first.out.shape != second.out.shape or first.out.dtype != second.out.dtype:
        raise ValueError(
            f"the parts are {first.out.dtype} {tuple(first.out.shape)} and {second.out.dtype} "
            f"{tuple(second.out.shape)}; they must be of the same queries, in one dtype"
        )
