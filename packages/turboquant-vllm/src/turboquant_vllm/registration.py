"""Our backend's name among vLLM's backends, also in processes that vLLM spawns."""

from __future__ import annotations

import copyreg
from collections.abc import Callable
from typing import Any

BACKEND_NAME = "FUSED_TURBOQUANT"
BACKEND_PATH = "turboquant_vllm.backend.FusedTurboQuantBackend"
OVERRIDE_PATH = "turboquant_vllm.backend.TakeoverBackend"


def register_name() -> None:
    """Make ``FUSED_TURBOQUANT`` a member of vLLM's enum of backends; ``CUSTOM`` too while nobody else has it."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if BACKEND_NAME not in AttentionBackendEnum.__members__:
        if hasattr(AttentionBackendEnum, "register"):
            AttentionBackendEnum.register(BACKEND_NAME, BACKEND_PATH)
        else:
            _add_member(AttentionBackendEnum)
    if not AttentionBackendEnum.CUSTOM.is_overridden():
        register_backend(AttentionBackendEnum.CUSTOM, BACKEND_PATH)
    # A spawned engine unpickles its configuration, and with it the member, before any plug-in is loaded.
    copyreg.pickle(AttentionBackendEnum, _reduce)


def override_native() -> None:
    """Serve vLLM's ``turboquant_*`` cache types through this backend."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.TURBOQUANT, OVERRIDE_PATH)


def _add_member(enumeration: Any) -> None:
    """What ``AttentionBackendEnum.register`` does where it exists (vLLM 0.32)."""
    member = object.__new__(enumeration)
    member._name_, member._value_ = BACKEND_NAME, BACKEND_PATH
    # Before _member_map_: EnumType refuses to set the attribute of a known member.
    setattr(enumeration, BACKEND_NAME, member)
    enumeration._member_map_[BACKEND_NAME] = member
    enumeration._value2member_map_[BACKEND_PATH] = member
    enumeration._member_names_.append(BACKEND_NAME)


def _reduce(member: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    if member.name == BACKEND_NAME:
        return restore_member, (member.name,)
    return getattr, (type(member), member.name)


def restore_member(name: str) -> Any:
    """The member ``name``, registered first if need be; called by unpickling."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from .plugin import register

    register()
    return AttentionBackendEnum[name]
