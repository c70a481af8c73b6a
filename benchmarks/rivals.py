"""What packed attention is measured against, each made ready for one decode step; an absent one says why."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

PAGE = 16
VLLM_PRESETS = ("turboquant_4bit_nc", "turboquant_3bit_nc", "turboquant_k8v4")
VLLM_SPLITS = 32
Step = Callable[[], Any]


class AbsentError(Exception):
    """A rival that cannot run here, and why."""


def module(name: str) -> Any:
    """Import ``name``.

    Raises:
        AbsentError: it is not installed, or does not import here.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise AbsentError(f"{name} does not import: {error}") from error


def flash_attention_3(library: Path | None) -> Callable[..., Any]:
    """vLLM's build of FlashAttention-3, from a shared library or from an installed vLLM.

    Raises:
        AbsentError: neither is there.
    """
    if library is not None:
        torch.ops.load_library(str(library.resolve()))
    else:
        module("vllm.vllm_flash_attn._vllm_fa3_C")
    forward: Callable[..., Any] = torch.ops._vllm_fa3_C.fwd
    return forward


def flash_attention_3_step(forward: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor) -> Step:
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


def flash_attention_2_step(q: Tensor, k: Tensor, v: Tensor) -> Step:
    """The same through the package flash-attn, its decode kernel over a contiguous cache.

    Raises:
        AbsentError: flash-attn is not installed.
    """
    forward = module("flash_attn").flash_attn_with_kvcache
    lengths = torch.full((k.shape[0],), k.shape[1], dtype=torch.int32, device=q.device)
    query = q.unsqueeze(1)
    return lambda: forward(query, k, v, cache_seqlens=lengths, causal=True)


def sdpa_step(q: Tensor, k: Tensor, v: Tensor) -> Step:
    """The same through torch's scaled_dot_product_attention, keys and values head-major."""
    query = q.unsqueeze(2)
    keys, values = k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous()
    return lambda: F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)


def vllm_turboquant_step(preset: str, q: Tensor, tokens: int, kv_heads: int) -> Step:
    """vLLM's own TurboQuant decode kernels (0.20 to 0.33) over random bytes, q ``[batch, q_heads, d]``.

    Raises:
        AbsentError: vLLM is not installed, or has no such preset.
    """
    decode = module("vllm.v1.attention.ops.triton_turboquant_decode").triton_turboquant_decode_attention
    config_type = module("vllm.model_executor.layers.quantization.turboquant.config").TurboQuantConfig
    batch, _, head_dim = q.shape
    try:
        config = config_type.from_cache_dtype(preset, head_dim)
    except ValueError as error:
        raise AbsentError(str(error)) from error
    shape = (batch * tokens // PAGE, PAGE, kv_heads, config.slot_size_aligned)
    # Bytes below 60 read as small fp16 norms, scales and zeros, and as finite fp8 keys.
    cache = torch.randint(0, 60, shape, dtype=torch.uint8, device=q.device)
    table = torch.randperm(shape[0], device=q.device).int().view(batch, -1).contiguous()
    lengths = torch.full((batch,), tokens, dtype=torch.int32, device=q.device)
    rotation = torch.eye(head_dim, device=q.device)
    memory = {
        "mid_o_buf": torch.empty(batch, q.shape[1], VLLM_SPLITS, head_dim + 1, device=q.device),
        "output_buf": torch.empty_like(q),
        "lse_buf": torch.empty(q.shape[:2], device=q.device),
    }
    centroids = torch.linspace(-2, 2, 1 << max(config.key_mse_bits, 1), device=q.device) / math.sqrt(head_dim)
    return lambda: decode(
        query=q,
        kv_cache=cache,
        block_table=table,
        seq_lens=lengths,
        Pi=rotation,
        PiT=rotation,
        centroids=centroids,
        scale=head_dim**-0.5,
        mse_bits=config.key_mse_bits,
        key_packed_size=config.key_packed_size,
        value_quant_bits=config.effective_value_quant_bits,
        key_fp8=config.key_fp8,
        norm_correction=config.norm_correction,
        max_num_kv_splits=VLLM_SPLITS,
        **memory,
    )


def fused_turboquant_step(bits: int, q: Tensor, k: Tensor, v: Tensor) -> Step:
    """What fused-turboquant 0.1.0 does in a decode step: scores from packed keys, softmax, decoded values, product.

    Raises:
        AbsentError: it is not installed.
    """
    scores = module("fused_turboquant.kernels.triton_attention").fused_qk_scores_rht
    batch, q_heads, head_dim = q.shape
    quantizer = module("fused_turboquant.core.quantizer").TurboQuantMSE(head_dim, bits=bits, device=str(q.device))
    keys, values = (quantizer.encode(x.transpose(1, 2).contiguous()) for x in (k, v))
    centroids, group = quantizer.quantizer.levels, q_heads // k.shape[2]

    def step() -> Tensor:
        rotated = quantizer.rotation(q.float()).unsqueeze(2)
        weight = scores(rotated, keys.indices, keys.norms, centroids, head_dim**-0.5, bits).softmax(-1)
        weight = weight.view(batch, -1, group, weight.shape[-1])
        return (weight @ quantizer.decode(values)).view(q.shape)

    return step
