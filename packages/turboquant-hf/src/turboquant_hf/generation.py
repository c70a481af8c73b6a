"""``generate()`` with a packed cache on a model that was not patched.

A cache sees keys and values, never the text, and Transformers does not tell it that another prompt begins. What has
both is ``generate`` itself. It is wrapped once, when the first packed cache is made; given any other cache, or none, it
does what it did before, and the model is as it was when the call ends.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from .compat import GenerationMixin
from .prompts import packed_in, prompts_watched

_MARK = "_turboquant_watches"


def watch_generate() -> None:
    """Have every ``generate()`` check the prompts that it runs over packed caches. Idempotent."""
    mixin: Any = GenerationMixin
    original = mixin.generate
    if hasattr(original, _MARK):
        return

    @wraps(original)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        cache = packed_in(kwargs)
        if cache is None:
            return original(self, *args, **kwargs)
        if cache.has_past and _is_assisted(self, *args, **kwargs):
            raise ValueError(
                f"the cache holds {int(cache.get_seq_length())} tokens, and assisted decoding puts the whole prompt "
                "behind them: start a new cache, call reset() on this one, or generate without assistance"
            )
        with prompts_watched(self):
            return original(self, *args, **kwargs)

    setattr(generate, _MARK, True)
    mixin.generate = generate


def _is_assisted(model: Any, inputs: Any = None, generation_config: Any = None, **kwargs: Any) -> bool:
    """Whether ``generate`` with these arguments drafts tokens, by a model, a lookup, an early exit or own heads."""
    config = generation_config or model.generation_config
    names = ("prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")
    drafts = [kwargs.get(name, getattr(config, name, None)) for name in names]
    return any(draft not in (None, False) for draft in (kwargs.get("assistant_model"), *drafts))
