"""Watch what a patched model's ``generate`` feeds to a packed cache.

Transformers cuts the cached part off a prompt by length alone, so that an unrelated prompt on a used cache gives an
answer to a mixture of both. ``prepare_inputs_for_generation`` sees the whole prompt; no forward is touched.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from functools import wraps
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from .compat import CACHE_ARGUMENT, PreTrainedModel
from .packed_cache import PackedCache
from .padding import Padding
from .static_cache import TurboQuantStaticCache

_METHOD = "prepare_inputs_for_generation"


def _see(cache: PackedCache, input_ids: Tensor, arguments: dict[str, Any]) -> None:
    is_empty = not cache.has_past if isinstance(cache, TurboQuantStaticCache) else cache.get_seq_length() == 0
    # None: only new tokens are passed, chunk by chunk or by a caller who knows what is cached.
    is_whole = is_empty or arguments.get("next_sequence_length") is not None
    if arguments.get("inputs_embeds") is not None or not is_whole:
        cache.text.forget()
        return
    if arguments.get("is_first_iteration"):
        cache.text.check(input_ids, int(cache.get_seq_length()))
    elif not isinstance(cache, TurboQuantStaticCache):
        # Of a static cache, that would wait for the device in every step.
        cache.text.measure(int(cache.get_seq_length()))
    if isinstance(cache, TurboQuantStaticCache):
        cache.check_room(input_ids.shape[1])
        # The forward gets a mask of four dimensions, made before it.
        _note_mask(cache.padding, arguments.get("attention_mask"))
    cache.text.note(input_ids)


def _note_mask(padding: Padding, mask: Any) -> None:
    if padding.is_wanted and isinstance(mask, Tensor) and mask.dim() == 2:
        padding.note(mask)


def _note_padding(model: PreTrainedModel, args: Any, kwargs: dict[str, Any]) -> None:
    """Tell a packed cache where its sequences begin: its layers see no mask."""
    cache = kwargs.get(CACHE_ARGUMENT)
    padding = getattr(getattr(cache, "self_attention_cache", cache), "padding", None)
    if isinstance(padding, Padding):
        _note_mask(
            padding, kwargs.get("decoder_attention_mask" if model.config.is_encoder_decoder else "attention_mask")
        )


_hooks: MutableMapping[PreTrainedModel, RemovableHandle] = WeakKeyDictionary()


def watch_prompts(model: PreTrainedModel) -> None:
    """Check the prompts of ``model.generate`` on packed caches. Idempotent."""
    original = getattr(type(model), _METHOD, None)
    if original is None or _METHOD in vars(model):
        return

    @wraps(original)
    def prepare(self: PreTrainedModel, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get(CACHE_ARGUMENT)
        if not isinstance(cache, PackedCache):
            return original(self, input_ids, *args, **kwargs)
        _see(cache, input_ids, kwargs)
        inputs = original(self, input_ids, *args, **kwargs)
        if kwargs.get("is_first_iteration"):
            cache.text.check_cut(input_ids, inputs["input_ids"])
        return inputs

    # Before every forward, also of one that generate() does not call.
    _hooks[model] = model.register_forward_pre_hook(_note_padding, with_kwargs=True)
    # A method, not a closure over the model: a copy of the model is watched as itself.
    vars(model)[_METHOD] = MethodType(prepare, model)


def unwatch_prompts(model: PreTrainedModel) -> None:
    """Undo :func:`watch_prompts`. Idempotent."""
    vars(model).pop(_METHOD, None)
    hook = _hooks.pop(model, None)
    if hook is not None:
        hook.remove()


def is_watched(model: PreTrainedModel) -> bool:
    """Whether :func:`watch_prompts` was called; every patched model is watched."""
    return _METHOD in vars(model)
