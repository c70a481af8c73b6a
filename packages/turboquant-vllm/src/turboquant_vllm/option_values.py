"""Values of single options: each reader returns the checked value, or raises ``OptionError`` with what is allowed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from turboquant_core import LayoutError
from turboquant_core.layout import BITS, check_bits

from .errors import OptionError
from .widths import RAW, UNCOMPRESSED, LayerBits, LayerChoice, ValueBits

_ALLOWED_BITS = ", ".join(map(str, BITS))


def bits_value(name: str, value: object) -> float:
    try:
        return check_bits(value)
    except LayoutError as error:
        raise OptionError(f"{name} is {value!r}; it must be one of {_ALLOWED_BITS}") from error


def bits_or_raw_value(name: str, value: object) -> ValueBits:
    if value == RAW:
        return "raw"
    try:
        return check_bits(value)
    except LayoutError as error:
        raise OptionError(f"{name} is {value!r}; it must be one of {_ALLOWED_BITS} or {RAW!r}") from error


def flag_value(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise OptionError(f"{name} is {value!r}; it must be true or false")
    return value


def count_value(name: str, value: object) -> int:
    if type(value) is not int or value < 0:
        raise OptionError(f"{name} is {value!r}; it must be a number of layers, 0 or more")
    return value


def tokens_value(name: str, value: object) -> int:
    if type(value) is not int or value < 0:
        raise OptionError(f"{name} is {value!r}; it must be a number of tokens, 0 for none")
    return value


def seed_value(name: str, value: object) -> int:
    if type(value) is not int or not 0 <= value < 2**64:
        raise OptionError(f"{name} is {value!r}; it must be an integer in [0, 2**64)")
    return value


def text_value(name: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise OptionError(f"{name} is {value!r}; it must be a name")
    return value


def one_of(*allowed: str) -> Callable[[str, object], str]:
    def read(name: str, value: object) -> str:
        if not isinstance(value, str) or value not in allowed:
            raise OptionError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")
        return value

    return read


def file_value(name: str, value: object) -> Path:
    path = Path(text_value(name, value))
    if not path.is_file():
        raise OptionError(f"{name} is {str(path)!r}, which is no file on this machine")
    return path


def choice_value(name: str, value: object) -> LayerChoice:
    if value == UNCOMPRESSED:
        return "uncompressed"
    if not isinstance(value, Mapping) or not value or set(value) - {"k_bits", "v_bits"}:
        raise OptionError(f"{name} is {value!r}; it must be {UNCOMPRESSED!r} or an object of k_bits and v_bits")
    keys = bits_value(f"{name}.k_bits", value.get("k_bits", 4))
    return LayerBits(keys, bits_or_raw_value(f"{name}.v_bits", value.get("v_bits", keys)))


def layers_value(name: str, value: object) -> tuple[tuple[int, LayerChoice], ...]:
    if not isinstance(value, Mapping):
        raise OptionError(f"{name} is {value!r}; it must be an object from layer index to bits")
    for key in value:
        if not str(key).removeprefix("-").isdecimal():
            raise OptionError(f"{name} has the key {key!r}; keys are layer indices such as 0 or -1")
    return tuple((int(key), choice_value(f"{name}.{key}", choice)) for key, choice in value.items())
