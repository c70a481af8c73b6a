"""Whether a model's attention may be found under another name."""

from __future__ import annotations

import re
import sys
from functools import cache
from pathlib import Path

from .attention import EAGER_NAME, NAME
from .compat import PreTrainedModel

BASES = {"sdpa": NAME, "eager": EAGER_NAME}
"""Attention implementation of a model, and what it becomes."""
NAMES = {name: base for base, name in BASES.items()}

_BRANCH = re.compile(r"_attn_implementation\s*(?:==|!=|in\b|not\s+in\b)\s*(\([^)]*\)|\[[^\]]*\]|\{[^}]*\}|[\w\"'.]+)")
_USES_INTERFACE = re.compile(r"ALL_ATTENTION_FUNCTIONS(?:\.get_interface\(|\[)")


@cache
def _source(module_name: str) -> str:
    """Source of a loaded module; empty when it has no file."""
    file = getattr(sys.modules[module_name], "__file__", None)
    return Path(file).read_text(encoding="utf-8") if file else ""


def _attention_modules(model: PreTrainedModel) -> set[str]:
    """Names of the Python modules that define the layers of ``model`` that use a cache."""
    users = {
        type(module).__module__ for module in model.modules() if isinstance(getattr(module, "layer_idx", None), int)
    }
    return users or {type(model).__module__}


def base_of(model: PreTrainedModel) -> str:
    """Attention implementation of the model without our names."""
    current = model.config.get_text_config(decoder=True)._attn_implementation
    return str(NAMES.get(current, current))


def check_attention(model: PreTrainedModel) -> None:
    """Raise ``ValueError`` when the model runs attention kernels that read the memory of keys themselves."""
    base = base_of(model)
    if base not in BASES:
        raise ValueError(
            f"the attention implementation of {type(model).__name__} is {base!r}, which cannot read packed keys: "
            f"choose one of {', '.join(BASES)} with model.set_attn_implementation('sdpa')"
        )


def why_not_registered(model: PreTrainedModel) -> str | None:
    """None when the model takes its attention by name; else why it is left untouched (calls are intercepted then)."""
    base = base_of(model)
    if base not in BASES:
        return f"its attention is {base!r}"
    sources = [_source(name) for name in sorted(_attention_modules(model))]
    if not any(_USES_INTERFACE.search(source) for source in sources):
        return "its attention does not go through Transformers' attention interface"
    # A comparison with another name than the base's has the same outcome under ours.
    if any(
        f"{quote}{base}{quote}" in match[1]
        for source in sources
        for match in _BRANCH.finditer(source)
        for quote in "'\""
    ):
        return f"its code asks whether the attention implementation is {base!r}"
    return None
