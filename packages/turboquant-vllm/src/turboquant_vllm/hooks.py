"""The three methods of vLLM that are wrapped: each calls the original, and acts on our layers only.

A backend is told neither which layer it serves nor may it leave a layer to another one; the CPU platform ignores the
backend that was chosen.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from .chosen import chosen, names_this_backend, tell_unused
from .compat import packed_spec
from .errors import UnsupportedError
from .limits import ELSEWHERE
from .native import is_native
from .setup import engine_options, layer_choice
from .widths import UNCOMPRESSED, LayerBits

_MARK = "_turboquant_wrapped"


def _wrapped(owner: type, name: str) -> bool:
    """Whether ``owner.name`` is wrapped already; marks it otherwise."""
    done = _MARK + name in owner.__dict__
    setattr(owner, _MARK + name, True)
    return done


def wrap_attention(module: ModuleType) -> None:
    """Tell our layers their name, size their pages, and leave layers that stay uncompressed to vLLM."""
    attention = module.Attention
    if _wrapped(attention, "init"):
        return
    attention.__init__ = _with_setup(attention)
    attention.get_kv_cache_spec = _with_packed_spec(attention.get_kv_cache_spec)


def _with_setup(attention: Any) -> Any:
    original = attention.__init__
    signature = inspect.signature(original)

    @functools.wraps(original)
    def build(self: Any, *args: Any, **kwargs: Any) -> None:
        from vllm.config import get_current_vllm_config

        vllm_config = get_current_vllm_config()
        arguments = signature.bind(self, *args, **kwargs).arguments
        pages_of = arguments.get("kv_sharing_target_layer_name") or arguments.get("prefix", "")
        with _native_backend_if(_stays_uncompressed(vllm_config, pages_of), vllm_config):
            original(self, *args, **kwargs)
        if _is_ours(self):
            _check_kind(self, attention)
            self.impl.set_up(self, vllm_config)
            _built[:] = [self.impl.setup.bits]
        elif not _built:
            tell_unused(vllm_config)

    return build


def _is_ours(layer: Any) -> bool:
    return hasattr(getattr(layer, "impl", None), "set_up")


def _check_kind(layer: Any, attention: type) -> None:
    if type(layer) is not attention:
        raise UnsupportedError(
            f"layer {layer.layer_name} is a {type(layer).__name__}; packed pages serve plain attention layers only: "
            + ELSEWHERE
        )


def _stays_uncompressed(vllm_config: Any, layer_name: str) -> bool:
    if vllm_config.model_config is None or not chosen(vllm_config):
        return False
    return layer_choice(engine_options(vllm_config), vllm_config, layer_name) == UNCOMPRESSED


@contextmanager
def _native_backend_if(wanted: bool, vllm_config: Any) -> Iterator[None]:
    """Let vLLM choose the backend of the layers built inside."""
    config = vllm_config.attention_config
    if not wanted:
        yield
        return
    chosen, per_kind = config.backend, getattr(config, "backend_per_kind", None)
    config.backend = None
    if per_kind:
        config.backend_per_kind = {}
    try:
        yield
    finally:
        config.backend = chosen
        if per_kind:
            config.backend_per_kind = per_kind


def _with_packed_spec(original: Any) -> Any:
    @functools.wraps(original)
    def get_kv_cache_spec(self: Any, vllm_config: Any) -> Any:
        if not _is_ours(self):
            return original(self, vllm_config)
        with sizing(self.impl.setup.token_bytes):
            spec = original(self, vllm_config)
        return None if spec is None else packed_spec(spec, self.impl.setup.token_bytes)

    return get_kv_cache_spec


_sized: list[int] = []
_built: list[LayerBits] = []


@contextmanager
def sizing(token_bytes: int) -> Iterator[None]:
    """Bytes a token that ``customize_spec`` of the backend answers with meanwhile: those of one layer."""
    _sized.append(token_bytes)
    try:
        yield
    finally:
        _sized.pop()


def sized_token_bytes() -> int | None:
    """Bytes a token of the layer whose spec is being made; None outside of that."""
    return _sized[-1] if _sized else None


def built_bits() -> LayerBits:
    """Bits of the layers that were built last: vLLM sizes blocks after it built a model, without its configuration.

    Raises:
        UnsupportedError: no packed layer was built yet.
    """
    if not _built:
        raise UnsupportedError("this vLLM asks for the size of pages before it has built a layer that is packed")
    return _built[0]


def wrap_cpu_platform(module: ModuleType) -> None:
    """Honour the choice of our backend on the CPU platform, which offers one backend of its own."""
    platform = module.CpuPlatform
    if _wrapped(platform, "select"):
        return
    original = platform.get_attn_backend_cls.__func__

    @functools.wraps(original)
    def get_attn_backend_cls(cls: Any, selected_backend: Any, *args: Any, **kwargs: Any) -> Any:
        config: Any = kwargs["attn_selector_config"] if "attn_selector_config" in kwargs else args[0]
        member = _ours_on_cpu(selected_backend, config)
        if member is None:
            return original(cls, selected_backend, *args, **kwargs)
        reasons = member.get_class().validate_configuration(device_capability=None, **config._asdict())
        if reasons:
            told = "; ".join(reasons)
            way_out = "" if ELSEWHERE in told else f": {ELSEWHERE}"
            raise ValueError(f"{member.name} does not serve this model ({told}){way_out}")
        return member.get_path()

    platform.get_attn_backend_cls = classmethod(get_attn_backend_cls)


def _ours_on_cpu(selected: Any, config: Any) -> Any:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    if names_this_backend(selected):
        return selected
    taken_over = AttentionBackendEnum.TURBOQUANT.is_overridden() and is_native(config.kv_cache_dtype)
    return AttentionBackendEnum.TURBOQUANT if taken_over and selected is None else None
