"""Keys and values as packing makes them, without a cache."""

from __future__ import annotations

from torch import Tensor

from turboquant_core import CacheCodec, Gathered, KernelProvider


def round_trip(codec: CacheCodec, provider: KernelProvider, key: Tensor, value: Tensor) -> Gathered:
    """Encode and decode keys ``[batch, kv_heads, tokens, head_dim]`` and values; raw values stay."""
    # A centre belongs to a KV head: heads come next to last.
    by_head = key.transpose(1, 2)
    key = provider.decode(provider.encode(by_head, codec.key), codec.key, key.dtype).transpose(1, 2)
    if codec.value is not None:
        value = provider.decode(provider.encode(value, codec.value), codec.value, value.dtype)
    return Gathered(key, value)
