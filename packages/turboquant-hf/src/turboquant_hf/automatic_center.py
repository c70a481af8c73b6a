"""Whether the mean of a prompt's keys is worth subtracting: ``center_keys="auto"``.

A mean over few positions is mostly the position embedding's: later keys do not share it, and subtracting it costs. So
short prompts are centred only where the offset dwarfs everything else.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from turboquant_core.doctor import offset_bits
from turboquant_core.doctor.diagnosis import tolerates_centre

LEAST_TOKENS = 16
"""Of a prompt; the mean of fewer says nothing."""
LONG_PROMPT = 256
LEAST_OFFSET_BITS = {LEAST_TOKENS: 1.37, LONG_PROMPT: 0.66}
"""Precision lost to the offset (85 % and 60 % of the energy of keys) from which on a KV head is centred."""


def automatic_center(keys: Tensor) -> Tensor | None:
    """What to subtract, float32 ``[kv_heads, head_dim]``; zeros for a head that is better left alone, None for all.

    Args:
        keys: the prompt's, float ``[batch, kv_heads, tokens, head_dim]``.
    """
    tokens = keys.shape[2]
    if tokens < LEAST_TOKENS:
        return None
    rows = keys.float().transpose(0, 1).flatten(1, 2)
    least = LEAST_OFFSET_BITS[LONG_PROMPT if tokens >= LONG_PROMPT else LEAST_TOKENS]
    is_offset = offset_bits(rows) >= least
    return rows.mean(1) * is_offset.unsqueeze(1) if bool(is_offset.any()) else None


def may_center(config: Any) -> bool:
    """Whether attention over centred keys can be computed packed: soft-capped scores and sinks see the centre."""
    return tolerates_centre(config.get_text_config(decoder=True))
