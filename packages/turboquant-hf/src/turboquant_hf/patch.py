"""Patch a model by name only: no forward is replaced."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, overload

from torch import Tensor

from .arguments import check_model, check_names, option_names
from .attention import register
from .blocks import fresh_caches
from .cache import TurboQuantCache
from .compat import PreTrainedModel
from .presets import BitsOrPreset, resolve
from .prompts import is_watched, unwatch_prompts, watch_prompts
from .quality import QualityWarning, concerns
from .registration import BASES, NAMES, check_attention, why_not_registered
from .static_cache import TurboQuantStaticCache
from .verify import verify_model, verify_static


def _switch(model: PreTrainedModel, names: dict[str, str]) -> None:
    current = model.config.get_text_config(decoder=True)._attn_implementation
    if current in names:
        # The text model alone: a vision tower has no cache.
        target: Any = names[current]
        model.set_attn_implementation({"text_config": target} if "text_config" in model.config.sub_configs else target)


def _check(function: Callable[..., Any], model: object, options: dict[str, Any]) -> PreTrainedModel:
    """The model within, before anything is measured: see ``Raises`` of :func:`patch_model`."""
    within = check_model(model)
    # The block of turboquant() passes it on to patch_model().
    own = [*option_names(function), "verify"]
    check_names(function.__name__, options, dict.fromkeys([*own, *option_names(TurboQuantCache.__init__)]))
    return within


@overload
def patch_model(
    model: PreTrainedModel,
    bits: BitsOrPreset = 4,
    *,
    max_cache_len: None = None,
    verify: bool = True,
    calibration: Tensor | None = None,
    **options: Any,
) -> TurboQuantCache: ...


@overload
def patch_model(
    model: PreTrainedModel,
    bits: BitsOrPreset = 4,
    *,
    max_cache_len: int,
    verify: bool = True,
    calibration: Tensor | None = None,
    **options: Any,
) -> TurboQuantStaticCache: ...


def patch_model(
    model: PreTrainedModel,
    bits: BitsOrPreset = 4,
    *,
    max_cache_len: int | None = None,
    verify: bool = True,
    calibration: Tensor | None = None,
    **options: Any,
) -> TurboQuantCache | TurboQuantStaticCache:
    """Make ``model`` attend to packed pages and return a cache for it.

    Warns (:class:`QualityWarning`) when verification finds that packing changes the attention of a layer too much.

    The model's attention implementation becomes ``"turboquant"`` (over ``sdpa``; ``"turboquant_eager"`` over
    ``eager``). A model that cannot be switched stays untouched; its ``scaled_dot_product_attention`` is intercepted.

    Args:
        model: a decoder or an encoder-decoder.
        bits: see :class:`TurboQuantCache`; or a :class:`turboquant_core.preset.Preset`, or the path of one's
            file, which ``turboquant doctor`` writes; or ``"auto"``, which has the doctor measure this model first
            (about twenty passes over 512 tokens more than it has layers).
        calibration: int64 ``[1, tokens]`` that ``"auto"`` and ``shaped=True`` measure on; None takes the doctor's text
            and the tokenizer in the model's folder.
        max_cache_len: tokens of a static cache (:class:`TurboQuantStaticCache`), for compiled models; None for one
            that grows.
        verify: compare a short generation with the stock cache (:func:`turboquant_hf.verify_model`) before returning.
        options: of the cache. ``shaped=True`` measures what :class:`TurboQuantCache` takes, in one pass over the text.

    Returns:
        An empty cache; what was verified is in its ``verification``. Pass it to ``generate`` as ``cache``
        (``past_key_values`` before Transformers 5.24).

    Raises:
        TurboQuantError: verification failed, or the doctor refuses the model; it is left as it was, as after any other
            error.
        ValueError: ``model`` is none, an option is out of range, a preset does not fit, no layer can be packed, or the
            model runs an attention implementation other than ``sdpa`` and ``eager``.
        TypeError: there is no such option.
    """
    model = _check(patch_model, model, options)
    numbers, options = resolve(model, bits, options, calibration)
    # Verification is about wiring: its twin codes vector by vector, shaped codes are those of a call.
    plain = {name: value for name, value in options.items() if name != "shaped"}
    if max_cache_len is not None and options.get("shaped"):
        raise ValueError("shaped codes need a cache that grows: leave max_cache_len out, or shaped")

    def fresh() -> TurboQuantCache:
        return TurboQuantCache(model.config, numbers, **plain)

    def static(room: int) -> TurboQuantStaticCache:
        return TurboQuantStaticCache(model.config, room, numbers, **plain)

    cache = static(max_cache_len) if max_cache_len is not None else TurboQuantCache(model.config, numbers, **options)
    check_attention(model)
    was_patched = is_watched(model)
    watch_prompts(model)
    if why_not_registered(model) is None:
        register()
        _switch(model, BASES)
    if verify:
        try:
            cache.verification = verify_model(model, fresh)
            if max_cache_len is not None:
                verify_static(model, static, fresh)
        # Whatever a model raises over pages that it cannot use.
        except Exception:
            if not was_patched:
                unpatch_model(model)
            raise
        for concern in concerns(cache.verification.layers, centered=cache.options.center_keys is not False):
            warnings.warn(f"{type(model).__name__}: {concern}", QualityWarning, stacklevel=2)
    return cache


def unpatch_model(model: PreTrainedModel) -> None:
    """Give the model its attention implementation back, and no longer check prompts. Idempotent.

    Raises:
        ValueError: ``model`` is no loaded Transformers model.
    """
    model = check_model(model)
    unwatch_prompts(model)
    _switch(model, NAMES)


@contextmanager
def turboquant(
    model: PreTrainedModel,
    bits: BitsOrPreset = 4,
    *,
    max_cache_len: int | None = None,
    calibration: Tensor | None = None,
    **options: Any,
) -> Iterator[None]:
    """Within the block, every ``model.generate()`` without a cache gets a fresh packed one.

    Pipelines and evaluation harnesses, which pass no cache, profit too. A block within another has its own options, and
    a model that was patched before stays so. ``cache_implementation="static"`` gives a
    static cache (:class:`TurboQuantStaticCache`) as long as the call may need.

    Args:
        model: a decoder or an encoder-decoder.
        bits: see :func:`patch_model`.
        max_cache_len: every cache is static, with room for so many tokens.
        calibration: see :func:`patch_model`.
        options: of :func:`patch_model`.

    Raises:
        TurboQuantError: verification failed.
        ValueError: ``model`` is none, or an option is out of range.
        TypeError: there is no such option.
        RuntimeError: another thread is in a block of this model.
    """
    model = _check(turboquant, model, options)
    numbers, options = resolve(model, bits, options, calibration)
    cache_options = {name: value for name, value in options.items() if name != "verify"}

    def make(generation_config: Any, max_cache_length: int) -> TurboQuantCache | TurboQuantStaticCache:
        room = max_cache_len or _static_room(generation_config, max_cache_length)
        if room is None:
            return TurboQuantCache(model.config, numbers, **cache_options)
        return TurboQuantStaticCache(model.config, room, numbers, **cache_options)

    with fresh_caches(model, make):
        was_patched = is_watched(model)
        patch_model(model, numbers, max_cache_len=max_cache_len, **options)
        try:
            yield
        finally:
            if not was_patched:
                unpatch_model(model)


def _static_room(generation_config: Any, max_cache_length: int) -> int | None:
    """Tokens of the static cache that a call asks for; None when it asks for none."""
    if generation_config.cache_implementation != "static":
        return None
    # Transformers accepts a cache or its name; this configuration is the call's own copy.
    generation_config.cache_implementation = None
    return max(max_cache_length, getattr(generation_config, "max_cache_len", None) or 0)
