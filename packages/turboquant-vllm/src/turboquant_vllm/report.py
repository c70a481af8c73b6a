"""The one line at the start that says what is packed and what that gains."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

from .setup import LayerSetup, packed_layers

logger = logging.getLogger("vllm.turboquant")
"""Under vLLM's logger, which is the one that has a handler."""

REFUSED = (
    "MLA, ALiBi, encoder and cross attention, chunked local attention, fp8 and other quantized cache types, "
    "decode and prefill context parallelism, overlapping halves of a step, fast prefill of shared pages, "
    "KV connectors but offloading to the host"
)


def announce(vllm_config: Any) -> None:
    """Log :func:`start_line` once for each model of this process."""
    context = vllm_config.compilation_config.static_forward_context
    if context is not _last_announced[0]:
        _last_announced[0] = context
        logger.info(start_line(vllm_config))


_last_announced: list[Any] = [None]


def start_line(vllm_config: Any) -> str:
    """Bits, bytes, gain in blocks, provider, device and what is refused."""
    setups = list(packed_layers(vllm_config))
    attention = _attention_layers(vllm_config)
    groups = Counter(_describe(setup) for setup in setups)
    parts = "; ".join(f"{count} of {len(attention)} layers: {text}" for text, count in groups.items())
    providers = ", ".join(sorted({setup.provider.name for setup in setups}))
    slow = " (for checking only: no GPU)" if any(s.request.device.type == "cpu" for s in setups) else ""
    return (
        f"FUSED_TURBOQUANT: {parts}; {blocks_gain(setups, attention):.2f} times the blocks of the model's dtype; "
        f"kernels: {providers}{slow}; prompts attend to {_prompts(setups)}; refused: {REFUSED}"
    )


def _prompts(setups: list[LayerSetup]) -> str:
    packed = any(setup.options.prefill == "packed" for setup in setups)
    return "packed pages" if packed else "their own keys and values in the model's dtype"


def _describe(setup: LayerSetup) -> str:
    uncompressed = setup.shape.uncompressed_token_bytes
    centered = ", centred keys" if setup.center is not None else ""
    return (
        f"{setup.bits}{centered}, {setup.token_bytes} bytes a token and head instead of {uncompressed}{_exact(setup)}"
    )


def _exact(setup: LayerSetup) -> str:
    if not setup.exact.rows:
        return ""
    share = setup.token_bytes - setup.shape.token_bytes(setup.bits)
    options = setup.options
    return (
        f", {share} of them for the first {options.sink_tokens} and the last {options.recent_tokens} tokens in the "
        f"model's dtype in blocks of {setup.page_size}"
    )


def _attention_layers(vllm_config: Any) -> list[Any]:
    layers = vllm_config.compilation_config.static_forward_context.values()
    return [
        layer
        for layer in layers
        if hasattr(layer, "num_kv_heads") and getattr(layer, "kv_sharing_target_layer_name", None) is None
    ]


def blocks_gain(setups: list[LayerSetup], attention: list[Any]) -> float:
    """Blocks in the same memory, over those without packing, layers that stay uncompressed included."""
    packed = {setup.name: setup for setup in setups}
    before = after = 0
    for layer in attention:
        setup = packed.get(layer.layer_name)
        full = 2 * layer.head_size * layer.num_kv_heads * layer.dtype.itemsize
        before += full
        after += setup.token_bytes * setup.shape.kv_heads if setup else full
    return before / after
