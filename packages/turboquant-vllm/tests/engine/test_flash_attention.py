"""FlashAttention as prompts call it on a GPU, PyTorch in its place: arguments that vLLM documents, and the result."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from turboquant_vllm.errors import UnsupportedError
from turboquant_vllm.raw_attention import Bounds, Scoring, flash_attention, torch_attention

with warnings.catch_warnings():
    # vLLM's imports use what is deprecated.
    warnings.simplefilter("ignore")
    from vllm.v1.attention.backends import fa_utils

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 32
FA_VERSION = 3


def varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    max_seqlen_q: int,
    cu_seqlens_q: Tensor,
    max_seqlen_k: int,
    cu_seqlens_k: Tensor,
    *,
    softmax_scale: float,
    causal: bool,
    window_size: list[int],
    softcap: float,
    return_softmax_lse: bool,
    out: Tensor | None,
    fa_version: int,
) -> tuple[Tensor, Tensor]:
    """vLLM's function of that name in float64; the log-sum-exp is ``[q_heads, tokens]``."""
    assert fa_version == FA_VERSION
    assert return_softmax_lse
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    result = torch.empty_like(q) if out is None else out
    lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32)
    spans = zip(itertools.pairwise(cu_seqlens_q.tolist()), itertools.pairwise(cu_seqlens_k.tolist()), strict=True)
    for (first, last), (start, stop) in spans:
        assert last - first <= max_seqlen_q
        assert stop - start <= max_seqlen_k
        queries = q[first:last].double()
        keys, values = (x[start:stop].double().repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
        scores = softmax_scale * torch.einsum("qhd,khd->hqk", queries, keys)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        # The last query stands at the last key; a window counts keys to the left of it.
        distance = torch.arange(stop - start) - torch.arange(last - first).unsqueeze(1) - (stop - start - last + first)
        right = 0 if causal else window_size[1]
        if right >= 0:
            scores.masked_fill_(distance > right, -torch.inf)
        if window_size[0] >= 0:
            scores.masked_fill_(distance < -window_size[0], -torch.inf)
        result[first:last] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values).to(result.dtype)
        lse[:, first:last] = scores.logsumexp(-1).float()
    return result, lse


@pytest.fixture
def available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fa_utils, "flash_attn_varlen_func", varlen, raising=False)
    monkeypatch.setattr(fa_utils, "get_flash_attn_version", lambda head_size: FA_VERSION)
    monkeypatch.setattr(fa_utils, "is_flash_attn_varlen_func_available", lambda: True)


def bounds(*host: int) -> Bounds:
    return Bounds(torch.tensor(host, dtype=torch.int32), host)


@pytest.mark.usefixtures("available")
@pytest.mark.parametrize("given", [True, False], ids=["out", "no out"])
@pytest.mark.parametrize(
    ("scoring", "causal"),
    [
        (Scoring(0.2, None, None), True),
        (Scoring(0.2, None, None), False),
        (Scoring(0.2, 5, None), True),
        (Scoring(0.2, None, 3.0), True),
        (Scoring(0.2, 4, 3.0), True),
    ],
)
def test_it_is_the_attention_of_a_cpu(scoring: Scoring, causal: bool, given: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(12, HEADS, HEAD_DIM, generator=generator)
    key, value = torch.randn(2, 21, KV_HEADS, HEAD_DIM, generator=generator)
    arguments: Any = (query, key, value, bounds(0, 3, 12), bounds(0, 8, 21), scoring)
    out = torch.empty_like(query) if given else None
    found = flash_attention(HEAD_DIM)(*arguments, causal=causal, out=out)
    expected = torch_attention(*arguments, causal=causal)
    assert out is None or found.out is out
    assert found.lse.shape == (12, HEADS)
    torch.testing.assert_close(found.out, expected.out, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(found.lse, expected.lse, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(("is_there", "version"), [(False, FA_VERSION), (True, None)])
def test_without_it_the_start_is_refused(monkeypatch: pytest.MonkeyPatch, is_there: bool, version: int | None) -> None:
    monkeypatch.setattr(fa_utils, "get_flash_attn_version", lambda head_size: version)
    monkeypatch.setattr(fa_utils, "is_flash_attn_varlen_func_available", lambda: is_there)
    with pytest.raises(UnsupportedError, match="prompts need vLLM's FlashAttention"):
        flash_attention(HEAD_DIM)
