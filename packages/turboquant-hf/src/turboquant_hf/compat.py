"""What turboquant-hf takes from Transformers: the one place that a new release may have to change."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any, TypeVar

import torch
from transformers import cache_utils, masking_utils
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
    StaticCache,
    StaticLayer,
    StaticSlidingWindowLayer,
)
from transformers.generation.utils import GenerationMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as MASK_FUNCTIONS
from transformers.masking_utils import create_causal_mask, eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as ATTENTION_FUNCTIONS
from transformers.modeling_utils import PreTrainedModel

_Function = TypeVar("_Function", bound=Callable[..., Any])

CACHE_ARGUMENT = "cache" if "cache" in signature(create_causal_mask).parameters else "past_key_values"
"""Keyword by which ``generate`` and ``forward`` take a cache: ``cache`` since Transformers 5.24."""
CACHE_ARGUMENTS = dict.fromkeys((CACHE_ARGUMENT, "past_key_values"))
"""That keyword first, and the one that Transformers still takes, with a warning."""

RESET_KEEPS_LENGTH = "reset" not in vars(DynamicLayer)
"""Whether a growing layer, when it is reset, keeps as many zeros as it held tokens: so before Transformers 5.18."""

_HYBRID_SLIDING_MASKS = getattr(masking_utils, "LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING", {}).get("hybrid_sliding")
GENERATE_MASKS_LACK_WINDOWS = (
    isinstance(_HYBRID_SLIDING_MASKS, dict) and _HYBRID_SLIDING_MASKS.get("sliding_attention") is create_causal_mask
)
"""Whether ``generate`` with a static cache shows all of the past to a sliding window that has a linear-attention state
beside it: so in Transformers 5.24, whose own static cache fails there."""

# Layers that Transformers 5.5 does not have; None is the type of no layer.
DynamicIndexedLayer: Any = getattr(cache_utils, "DynamicIndexedLayer", None)
StaticIndexedLayer: Any = getattr(cache_utils, "StaticIndexedLayer", None)
LinearAttentionAndSlidingWindowAttentionLayer: Any = getattr(
    cache_utils, "LinearAttentionAndSlidingWindowAttentionLayer", None
)
LinearAttentionAndStaticFullAttentionLayer: Any = getattr(
    cache_utils, "LinearAttentionAndStaticFullAttentionLayer", None
)
LinearAttentionAndStaticSlidingWindowAttentionLayer: Any = getattr(
    cache_utils, "LinearAttentionAndStaticSlidingWindowAttentionLayer", None
)


def uncompiled(reason: str) -> Callable[[_Function], _Function]:
    """Decorator of what a compiler must leave alone; ``reason`` says why where all of a model has to be one graph."""
    # torch 2.6 does not ask why.
    asked = {"reason": reason} if "reason" in signature(torch.compiler.disable).parameters else {}
    return lambda function: torch.compiler.disable(function, **asked)


__all__ = [
    "ATTENTION_FUNCTIONS",
    "CACHE_ARGUMENT",
    "CACHE_ARGUMENTS",
    "GENERATE_MASKS_LACK_WINDOWS",
    "MASK_FUNCTIONS",
    "RESET_KEEPS_LENGTH",
    "Cache",
    "DynamicCache",
    "DynamicIndexedLayer",
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "GenerationMixin",
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer",
    "LinearAttentionAndStaticFullAttentionLayer",
    "LinearAttentionAndStaticSlidingWindowAttentionLayer",
    "LinearAttentionCacheLayerMixin",
    "LinearAttentionLayer",
    "PreTrainedModel",
    "StaticCache",
    "StaticIndexedLayer",
    "StaticLayer",
    "StaticSlidingWindowLayer",
    "eager_mask",
    "sdpa_attention_forward",
    "sdpa_mask",
    "uncompiled",
]
