"""Attention over new tokens and over their context, put together where the first lies."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from turboquant_core import Attended, merge_attended

MERGE_TOKENS = 2048
"""Tokens merged at a time without vLLM's kernel: that works in float32."""


def merge_into(out: Tensor, lse: Tensor, seen: Attended) -> None:
    """Make ``out`` and ``lse`` the attention over their own keys and those of ``seen`` together.

    Args:
        out: ``[tokens, q_heads, head_dim]``, written.
        lse: float32 ``[tokens, q_heads]``, written.
        seen: attention of the same queries over other keys.
    """
    if out.device.type == "cpu":
        _merge_in_parts(out, lse, seen)
    else:
        _merge_by_kernel(out, lse, seen)


def _merge_by_kernel(out: Tensor, lse: Tensor, seen: Attended) -> None:
    from vllm.v1.attention.ops.merge_attn_states import merge_attn_states

    # The kernel takes contiguous [q_heads, tokens]. Threads of a head read its lse after others may have written it.
    own, other = lse.T.contiguous(), seen.lse.T.contiguous()
    merged = own.new_empty(own.shape)
    merge_attn_states(out, seen.out, other, out, own, merged)
    lse.copy_(merged.T)


def _merge_in_parts(out: Tensor, lse: Tensor, seen: Attended) -> None:
    for part in _parts(out.shape[0]):
        merged = merge_attended(Attended(out[part], lse[part]), Attended(seen.out[part], seen.lse[part]))
        out[part], lse[part] = merged.out, merged.lse


def _parts(tokens: int) -> Iterator[slice]:
    for start in range(0, tokens, MERGE_TOKENS):
        yield slice(start, start + MERGE_TOKENS)
