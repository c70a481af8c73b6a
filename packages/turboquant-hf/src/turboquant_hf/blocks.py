"""A packed cache for every ``generate()`` that brings none, as long as a block of ``turboquant()`` is open."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from threading import Lock, get_ident
from types import MethodType
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

from .compat import CACHE_ARGUMENT, PreTrainedModel
from .generation import for_model
from .packed_cache import PackedCache

MakeCache: TypeAlias = Callable[[Any, int], PackedCache]
"""From the configuration of a call and the tokens that it may need to an empty cache."""

_METHOD = "_prepare_cache_for_generation"
_OF_A_DRAFTER = "dynamic_full"
"""What a drafting model asks for before its cache could record its past: one without windows, which stays stock."""


@dataclass(slots=True, eq=False)
class _Blocks:
    """Open blocks of one model, the innermost last."""

    thread: int
    makers: list[MakeCache] = field(default_factory=list)


_open: MutableMapping[PreTrainedModel, _Blocks] = WeakKeyDictionary()
_lock = Lock()


def _replace_method(model: PreTrainedModel) -> None:
    original = getattr(type(model), _METHOD)

    @wraps(original)
    def prepare(self: PreTrainedModel, config: Any, arguments: dict[str, Any], mode: Any, *sizes: Any) -> Any:
        blocks = _open.get(self)
        is_asked = config.use_cache is not False and config.cache_implementation != _OF_A_DRAFTER
        if blocks is not None and arguments.get(CACHE_ARGUMENT) is None and is_asked:
            cache: Any = blocks.makers[-1](config, sizes[-1])
            if getattr(config, "is_assistant", False) and hasattr(cache, "activate_past_recording"):
                # As Transformers does with a cache of its own: rejected drafts are taken back.
                cache.activate_past_recording()
            arguments[CACHE_ARGUMENT] = for_model(self, cache)
        return original(self, config, arguments, mode, *sizes)

    # On the instance, where it hides the method of the class; a copy of the model is in no block.
    vars(model)[_METHOD] = MethodType(prepare, model)


@contextmanager
def fresh_caches(model: PreTrainedModel, make: MakeCache) -> Iterator[None]:
    """Within the block, ``generate()`` of ``model`` in any thread gets caches of ``make`` where it is given none.

    Raises:
        RuntimeError: another thread has such a block of this model, whose calls would get these caches.
    """
    with _lock:
        blocks = _open.get(model)
        if blocks is None:
            blocks = _open[model] = _Blocks(get_ident())
            _replace_method(model)
        elif blocks.thread != get_ident():
            raise RuntimeError(
                "another thread is in a block of turboquant() of this model, whose calls would get this block's "
                "caches: open one block around all threads, or give each generate() a cache of its own"
            )
        blocks.makers.append(make)
    try:
        yield
    finally:
        with _lock:
            blocks.makers.remove(make)
            if not blocks.makers:
                del _open[model]
                del vars(model)[_METHOD]
