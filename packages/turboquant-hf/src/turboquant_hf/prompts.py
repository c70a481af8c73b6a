"""Watch what a patched model's ``generate`` feeds to a packed cache.

Transformers cuts the cached part off a prompt by length alone, so that an unrelated prompt on a used cache gives an
answer to a mixture of both. ``prepare_inputs_for_generation`` sees the whole prompt; no forward is touched.
"""

from __future__ import annotations

from functools import wraps
from types import MethodType
from typing import Any

from torch import Tensor

from .cache import TurboQuantCache
from .compat import CACHE_ARGUMENT, PreTrainedModel

_METHOD = "prepare_inputs_for_generation"


def _see(cache: TurboQuantCache, input_ids: Tensor, arguments: dict[str, Any]) -> None:
    length = cache.get_seq_length()
    # None: only new tokens are passed, chunk by chunk or by a caller who knows what is cached.
    is_whole = length == 0 or arguments.get("next_sequence_length") is not None
    if arguments.get("inputs_embeds") is not None or not is_whole:
        cache.text.forget()
        return
    if arguments.get("is_first_iteration"):
        cache.text.check(input_ids, length)
    cache.text.note(input_ids)


def watch_prompts(model: PreTrainedModel) -> None:
    """Check the prompts of ``model.generate`` on packed caches. Idempotent."""
    original = getattr(type(model), _METHOD, None)
    if original is None or _METHOD in vars(model):
        return

    @wraps(original)
    def prepare(self: PreTrainedModel, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get(CACHE_ARGUMENT)
        if isinstance(cache, TurboQuantCache):
            _see(cache, input_ids, kwargs)
        return original(self, input_ids, *args, **kwargs)

    # A method, not a closure over the model: a copy of the model is watched as itself.
    vars(model)[_METHOD] = MethodType(prepare, model)


def unwatch_prompts(model: PreTrainedModel) -> None:
    """Undo :func:`watch_prompts`. Idempotent."""
    vars(model).pop(_METHOD, None)


def is_watched(model: PreTrainedModel) -> bool:
    """Whether :func:`watch_prompts` was called; every patched model is watched."""
    return _METHOD in vars(model)
