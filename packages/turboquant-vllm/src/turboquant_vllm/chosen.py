"""Whether a user chose this backend, and a word to who gave options without choosing it."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

from .native import is_native
from .options import BITS_VARIABLE, COMPRESS_V_VARIABLE, CONFIG_KEY
from .registration import BACKEND_NAME, BACKEND_PATH

logger = logging.getLogger("vllm.turboquant")
_told: list[str] = []


def names_this_backend(member: Any) -> bool:
    """Whether a member of vLLM's enum of backends is this one: by its name, or ``CUSTOM`` where nobody else has it."""
    name = getattr(member, "name", None)
    return name == BACKEND_NAME or (name == "CUSTOM" and member.is_overridden() and member.get_path() == BACKEND_PATH)


def chosen(vllm_config: Any) -> bool:
    """Whether the user chose this backend for all layers or for some kind of them."""
    config = vllm_config.attention_config
    return any(map(names_this_backend, (config.backend, *(getattr(config, "backend_per_kind", None) or {}).values())))


def tell_unused(vllm_config: Any) -> None:
    """Warn, once a process, that options were given to an engine whose layers are built without this backend."""
    if _told or chosen(vllm_config) or is_native(vllm_config.cache_config.cache_dtype):
        return
    given = [name for name in (BITS_VARIABLE, COMPRESS_V_VARIABLE) if os.environ.get(name)]
    if isinstance(vllm_config.additional_config, Mapping) and CONFIG_KEY in vllm_config.additional_config:
        given.insert(0, f"additional_config[{CONFIG_KEY!r}]")
    if given:
        _told.append(given[0])
        logger.warning(
            "%s is given, but nothing is packed: choose the backend, --attention-backend %s", given[0], BACKEND_NAME
        )
