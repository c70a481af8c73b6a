"""Both ways to merge against attention over all keys in float64."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

from turboquant_core import Attended
from turboquant_vllm import merging

TOKENS, HEADS, HEAD_DIM, KEYS = 5, 3, 16, 40


def attention(query: Tensor, key: Tensor, value: Tensor) -> Attended:
    scores = torch.einsum("thd,khd->thk", query, key)
    out = torch.einsum("thk,khd->thd", torch.softmax(scores, -1), value)
    return Attended(out.float(), torch.logsumexp(scores, -1).float())


def kernel(
    output: Tensor, prefix: Tensor, prefix_lse: Tensor, suffix: Tensor, suffix_lse: Tensor, output_lse: Tensor
) -> None:
    """What vLLM documents of its kernel, and which tensors it may be given."""
    for lse in (prefix_lse, suffix_lse, output_lse):
        assert lse.shape == (HEADS, TOKENS)
        assert lse.is_contiguous()
    assert output_lse.data_ptr() not in (prefix_lse.data_ptr(), suffix_lse.data_ptr())
    assert prefix.stride(1) == suffix.stride(1)
    merged = torch.logaddexp(prefix_lse, suffix_lse)
    weights = [(lse - merged).exp().T.unsqueeze(-1) for lse in (prefix_lse, suffix_lse)]
    output.copy_(weights[0] * prefix + weights[1] * suffix)
    output_lse.copy_(merged)


@pytest.mark.parametrize("by_kernel", [False, True])
def test_merge(monkeypatch: pytest.MonkeyPatch, by_kernel: bool) -> None:
    module = ModuleType("merge_attn_states")
    module.merge_attn_states = kernel  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm.v1.attention.ops.merge_attn_states", module)
    monkeypatch.setattr(merging, "MERGE_TOKENS", 2)
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(TOKENS, HEADS, HEAD_DIM, dtype=torch.float64, generator=generator)
    key, value = torch.randn(2, KEYS, HEADS, HEAD_DIM, dtype=torch.float64, generator=generator)
    own, seen = attention(query, key[:7], value[:7]), attention(query, key[7:], value[7:])
    # As a row of a larger step has it: a part of what FlashAttention gave as [q_heads, tokens].
    lse = torch.zeros(HEADS, TOKENS + 4).T[2 : 2 + TOKENS]
    lse.copy_(own.lse)
    merge = merging._merge_by_kernel if by_kernel else merging.merge_into
    merge(own.out, lse, seen)
    expected = attention(query, key, value)
    torch.testing.assert_close(own.out, expected.out, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(lse, expected.lse, atol=1e-6, rtol=1e-5)
