"""Watch what ``generate`` feeds to a packed cache.

Transformers cuts the cached part off a prompt by length alone, so that an unrelated prompt on a used cache gives an
answer to a mixture of both. ``prepare_inputs_for_generation`` sees the whole prompt; no forward is touched.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from functools import wraps
from threading import Lock
from types import MethodType
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from .compat import CACHE_ARGUMENTS, PreTrainedModel
from .held_text import HeldText
from .padding import Padding

if TYPE_CHECKING:
    from .packed_cache import PackedCache

_METHOD = "prepare_inputs_for_generation"


def _cache_in(arguments: dict[str, Any]) -> Any:
    """The cache among arguments of ``generate`` or a forward, or the decoder's part of it; None where there is none."""
    given = (arguments.get(name) for name in CACHE_ARGUMENTS)
    cache = next((cache for cache in given if cache is not None), None)
    return getattr(cache, "self_attention_cache", cache)


def packed_in(arguments: dict[str, Any]) -> PackedCache | None:
    """The cache among arguments of ``generate``, or the decoder's part of it, where that is a packed one."""
    cache = _cache_in(arguments)
    return cache if isinstance(getattr(cache, "text", None), HeldText) else None


def _mask_in(model: PreTrainedModel, arguments: dict[str, Any]) -> Any:
    return arguments.get("decoder_attention_mask" if model.config.is_encoder_decoder else "attention_mask")


def _see(model: PreTrainedModel, cache: PackedCache, input_ids: Tensor, arguments: dict[str, Any]) -> None:
    is_first = bool(arguments.get("is_first_iteration"))
    if is_first:
        cache.check_generate()
    # None: only new tokens are passed, chunk by chunk or by a caller who knows what is cached.
    is_whole = not cache.has_past or arguments.get("next_sequence_length") is not None
    if arguments.get("inputs_embeds") is not None or not is_whole:
        if is_first:
            _check_decoder(model, cache, input_ids, _mask_in(model, arguments))
        cache.text.forget()
        return
    if is_first:
        cache.text.check(input_ids, int(cache.get_seq_length()))
    elif cache.room is None:
        # Of a static cache, that would wait for the device in every step.
        cache.text.measure(int(cache.get_seq_length()))
    cache.check_room(input_ids.shape[1])
    cache.text.note(input_ids)


def _check_decoder(model: PreTrainedModel, cache: PackedCache, input_ids: Tensor, mask: Any) -> None:
    """Raise ``ValueError`` when the decoder of an encoder-decoder would read another prompt behind its past."""
    is_cut = isinstance(mask, Tensor) and mask.shape[1] > input_ids.shape[1]
    if model.config.is_encoder_decoder and cache.has_past and not is_cut:
        raise ValueError(
            f"without a decoder_attention_mask the decoder's prompt of {input_ids.shape[1]} tokens goes behind the "
            f"{int(cache.get_seq_length())} that the cache holds: start a new cache, or pass that mask"
        )


def _note_mask(padding: Padding, mask: Any) -> None:
    if padding.is_wanted and isinstance(mask, Tensor) and mask.dim() == 2:
        padding.note(mask)


def _note_padding(model: PreTrainedModel, args: Any, kwargs: dict[str, Any]) -> None:
    """Tell a packed cache where its sequences begin: its layers see no mask."""
    # Not of packed caches alone: verification compares with one of decoded vectors, which has the same sinks.
    padding = getattr(_cache_in(kwargs), "padding", None)
    if isinstance(padding, Padding):
        _note_mask(padding, _mask_in(model, kwargs))


_hooks: MutableMapping[PreTrainedModel, RemovableHandle] = WeakKeyDictionary()
_blocks: MutableMapping[PreTrainedModel, int] = WeakKeyDictionary()
_lock = Lock()


def _replace_method(model: PreTrainedModel) -> None:
    original = getattr(type(model), _METHOD)

    @wraps(original)
    def prepare(self: PreTrainedModel, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        cache = packed_in(kwargs)
        if cache is None:
            return original(self, input_ids, *args, **kwargs)
        _see(self, cache, input_ids, kwargs)
        # Here too: the forward of a static cache gets a mask of four dimensions, and not every model has the hook.
        _note_mask(cache.padding, _mask_in(self, kwargs))
        inputs = original(self, input_ids, *args, **kwargs)
        if kwargs.get("is_first_iteration") and inputs.get("input_ids") is not None:
            cache.text.check_cut(input_ids, inputs["input_ids"])
        return inputs

    # A method, not a closure over the model: a copy of the model is watched as itself.
    vars(model)[_METHOD] = MethodType(prepare, model)


def watch_prompts(model: PreTrainedModel) -> None:
    """Check the prompts of ``model.generate`` on packed caches, until :func:`unwatch_prompts`. Idempotent."""
    with _lock:
        if is_watched(model) or not hasattr(type(model), _METHOD):
            return
        # Before every forward, also of one that generate() does not call.
        _hooks[model] = model.register_forward_pre_hook(_note_padding, with_kwargs=True)
        # A call of another thread that watches them for itself must not end this.
        if _blocks.pop(model, None) is None:
            _replace_method(model)


@contextmanager
def prompts_watched(model: PreTrainedModel) -> Iterator[None]:
    """Check prompts within the block, and leave the model as it was; blocks of several threads end with the last."""
    with _lock:
        if _METHOD not in vars(model) and hasattr(type(model), _METHOD):
            _replace_method(model)
            _blocks[model] = 0
        if model in _blocks:
            _blocks[model] += 1
    try:
        yield
    finally:
        with _lock:
            if model in _blocks:
                _blocks[model] -= 1
                if _blocks[model] == 0:
                    del _blocks[model]
                    unwatch_prompts(model)


def unwatch_prompts(model: PreTrainedModel) -> None:
    """Undo :func:`watch_prompts`. Idempotent."""
    vars(model).pop(_METHOD, None)
    hook = _hooks.pop(model, None)
    if hook is not None:
        hook.remove()


def is_watched(model: PreTrainedModel) -> bool:
    """Whether :func:`watch_prompts` was called; every patched model is watched."""
    return _METHOD in vars(model) and model not in _blocks
