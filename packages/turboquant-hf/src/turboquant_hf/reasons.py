"""Why keys or values are decoded, in words for whoever reads a summary."""

from __future__ import annotations

from typing import Any

_BIAS = "a bias on its scores"
_OWN_MASK = "a mask that it applies in its own way"
_WORDS = {
    "add": _BIAS,
    "additive bias": _BIAS,
    "baddbmm": _BIAS,
    "cat": "further columns beside its scores, such as attention sinks",
    "einsum": "products by einsum",
    "logsumexp": "a sum of its scores taken apart",
    "mask that differs between heads": _BIAS,
    "masked_fill": _OWN_MASK,
    "masked_fill_": _OWN_MASK,
    "max": "a maximum of its scores taken apart",
    "maximum": "a lower limit of its scores",
    "where": _OWN_MASK,
}
"""What else is done to scores, by the name of the function that does it or by what a mask was found to be."""

LATENT = "latent attention: keys and values are projected from what is cached"


def changed(operation: str = "") -> str:
    """The model does something with keys or values that is no attention."""
    return "keys or values that the model uses outside attention" + (f" ({operation})" if operation else "")


def written_out(what: str) -> str:
    """The model computes attention by itself, with something that packed attention lacks."""
    return f"attention that the model writes out itself, with {_WORDS.get(what, what)}"


def name_of(func: Any) -> str:
    """Of a function of torch or an operator, as users know it."""
    schema = getattr(func, "_schema", None)
    name = schema.name.split("::")[-1] if schema is not None else getattr(func, "__name__", str(func))
    # Not the last underscore of a method that works in place, which is another function.
    return str(name).removeprefix("__").removesuffix("__")
