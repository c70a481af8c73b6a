"""What differs between vLLM releases, found by looking for it and never by version number."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

ATTENTION_MODULE = "vllm.model_executor.layers.attention.attention"
CPU_PLATFORM_MODULE = "vllm.platforms.cpu"


def missing() -> str | None:
    """What this vLLM lacks to give a backend pages of its own size; None when it has all of it."""
    try:
        from vllm.v1.attention.backend import AttentionBackend
        from vllm.v1.attention.backends.registry import AttentionBackendEnum
    except ImportError as error:
        return f"its attention backends are not where they are since 0.20 ({error})"
    if not hasattr(AttentionBackendEnum, "CUSTOM"):
        return "its list of attention backends cannot be added to"
    from vllm.v1 import kv_cache_interface

    if not hasattr(AttentionBackend, "customize_spec") and not hasattr(kv_cache_interface, "TQFullAttentionSpec"):
        return "no backend can give its pages a size of its own"
    return None


def backend_sizes_pages() -> bool:
    """Whether a backend itself states the bytes of its pages (``customize_spec``, from 0.28)."""
    from vllm.v1.attention.backend import AttentionBackend

    return hasattr(AttentionBackend, "customize_spec")


def is_packed(spec: Any) -> bool:
    """Whether ``spec`` already has bytes of its own for a token."""
    return getattr(spec, "state_content_bytes", None) is not None or hasattr(spec, "tq_slot_size")


def packed_spec(spec: Any, token_bytes: int) -> Any:
    """``spec`` with ``token_bytes`` for each token and KV head, of dtype uint8."""
    import torch

    if hasattr(spec, "state_content_bytes"):
        return replace(spec, state_content_bytes=token_bytes, dtype=torch.uint8)
    from vllm.v1.kv_cache_interface import TQFullAttentionSpec

    # vLLM's own class: its cache manager looks specs up by exact type.
    common = {field.name: getattr(spec, field.name) for field in fields(spec) if field.init}
    return TQFullAttentionSpec(**{**common, "dtype": torch.uint8, "tq_slot_size": token_bytes})


def head_major_layouts() -> tuple[Any, ...]:
    """Layouts in which the tokens of one block and head are contiguous, and blocks follow one another."""
    from vllm.v1.kv_cache_interface import KVCacheLayout

    return (KVCacheLayout.LBHNC,)
