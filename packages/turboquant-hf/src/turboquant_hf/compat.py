"""What turboquant-hf takes from Transformers: the one place that a new release may have to change."""

from __future__ import annotations

from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as MASK_FUNCTIONS
from transformers.masking_utils import eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as ATTENTION_FUNCTIONS
from transformers.modeling_utils import PreTrainedModel

__all__ = [
    "ATTENTION_FUNCTIONS",
    "MASK_FUNCTIONS",
    "Cache",
    "DynamicCache",
    "DynamicLayer",
    "PreTrainedModel",
    "eager_mask",
    "sdpa_attention_forward",
    "sdpa_mask",
]
