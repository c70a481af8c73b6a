"""What packed attention is measured against: attention over 16-bit keys and values."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

PAGE = 16


def flash_attention_3(library: Path | None) -> Callable[..., Any] | None:
    """vLLM's build of FlashAttention-3: from a shared library, or from an installed vLLM; None when there is none."""
    if library is not None:
        torch.ops.load_library(str(library.resolve()))
    else:
        try:
            importlib.import_module("vllm.vllm_flash_attn._vllm_fa3_C")
        except ImportError:
            return None
    forward: Callable[..., Any] = torch.ops._vllm_fa3_C.fwd
    return forward


def flash_attention_3_step(forward: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Any]:
    """One decode step over pages of 16 tokens: q ``[batch, q_heads, d]``, k and v ``[batch, tokens, kv_heads, d]``."""
    batch, tokens, kv_heads, head_dim = k.shape
    pages = (batch * tokens // PAGE, PAGE, kv_heads, head_dim)
    table = torch.arange(pages[0], device=q.device, dtype=torch.int32).view(batch, -1)
    starts = torch.arange(batch + 1, dtype=torch.int32, device=q.device)
    lengths = torch.full((batch,), tokens, dtype=torch.int32, device=q.device)
    out, scale = torch.empty_like(q), head_dim**-0.5
    arguments = (
        q, k.view(pages), v.view(pages), None, None, None, out, starts, None, None, None, lengths, 1, tokens, table,
        None, None, None, None, None, None, None, None, scale, True, -1, -1, 0.0, True, None, 0, None, 0, None, 1, 0,
        None,
    )  # fmt: skip
    return lambda: forward(*arguments)


def sdpa_step(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Any]:
    """The same through torch's scaled_dot_product_attention, keys and values head-major."""
    query = q.unsqueeze(2)
    keys, values = k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous()
    return lambda: F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)
