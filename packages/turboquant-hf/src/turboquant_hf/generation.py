"""``generate()`` with a packed cache on a model that was not patched.

A cache sees keys and values, never the text, and Transformers does not tell it that another prompt begins. What has
both is ``generate`` itself. It is wrapped once, when the first packed cache is made; given any other cache, or none, it
does what it did before, and the model is as it was when the call ends.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from functools import wraps
from threading import Lock, get_ident
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from transformers import EncoderDecoderCache

from .compat import CACHE_ARGUMENTS, DynamicCache, GenerationMixin
from .prompts import packed_in, prompts_watched

if TYPE_CHECKING:
    from .packed_cache import PackedCache

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
        given = {name for name in CACHE_ARGUMENTS if kwargs.get(name) is cache}
        with _used_alone(cache), prompts_watched(self):
            return original(self, *args, **{**kwargs, **dict.fromkeys(given, for_model(self, cache))})

    setattr(generate, _MARK, True)
    mixin.generate = generate


def for_model(model: Any, cache: Any) -> Any:
    """``cache``, or with one for cross-attention where the model needs two: it would put both into the one."""
    return EncoderDecoderCache(cache, DynamicCache()) if model.config.is_encoder_decoder else cache


_users: MutableMapping[PackedCache, int] = WeakKeyDictionary()
_lock = Lock()


@contextmanager
def _used_alone(cache: PackedCache) -> Iterator[None]:
    """Raise ``RuntimeError`` when another thread is generating over ``cache``."""
    with _lock:
        user = _users.get(cache)
        if user not in (None, get_ident()):
            raise RuntimeError("another thread is generating over this cache: give each thread a cache of its own")
        _users[cache] = get_ident()
    try:
        yield
    finally:
        # A call within a call of the same thread leaves it to the outer one.
        if user is None:
            del _users[cache]


def _is_assisted(model: Any, inputs: Any = None, generation_config: Any = None, **kwargs: Any) -> bool:
    """Whether ``generate`` with these arguments drafts tokens, by a model, a lookup, an early exit or own heads."""
    config = generation_config or model.generation_config
    names = ("prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")
    drafts = [kwargs.get(name, getattr(config, name, None)) for name in names]
    return any(draft not in (None, False) for draft in (kwargs.get("assistant_model"), *drafts))
