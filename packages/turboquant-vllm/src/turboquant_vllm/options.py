"""What a user chooses: ``--additional-config '{"turboquant": {...}}'`` and two environment variables."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias

from turboquant_core import LayoutError
from turboquant_core.layout import BITS, check_bits
from turboquant_core.preset import Preset, PresetError, load_preset
from turboquant_core.scale import CACHE_RULE, SCALE_RULES, ScaleRule

from .errors import OptionError

CONFIG_KEY = "turboquant"
BITS_VARIABLE = "TURBOQUANT_BITS"
COMPRESS_V_VARIABLE = "TURBOQUANT_COMPRESS_V"
RAW = "raw"
UNCOMPRESSED = "uncompressed"

ValueBits: TypeAlias = float | Literal["raw"]
Prefill: TypeAlias = Literal["raw", "packed"]


@dataclass(frozen=True, slots=True)
class LayerBits:
    """Width of one layer's codes.

    Attributes:
        k_bits: bits of a key coordinate, one of :data:`turboquant_core.layout.BITS`.
        v_bits: bits of a value coordinate, or ``"raw"`` for values in the model's dtype.
    """

    k_bits: float = 4
    v_bits: ValueBits = 4

    def __str__(self) -> str:
        values = "in the model's dtype" if self.v_bits == RAW else f"{self.v_bits} bits"
        return f"keys {self.k_bits} bits, values {values}"


_ALLOWED_BITS = ", ".join(map(str, BITS))
_NUMBER = re.compile(r"\d+(\.\d+)?")

LayerChoice: TypeAlias = LayerBits | Literal["uncompressed"]


@dataclass(frozen=True, slots=True)
class Options:
    """Checked options of an engine.

    Attributes:
        default: bits of every layer that nothing else names.
        boundary_layers: how many first and how many last layers get ``boundary``.
        boundary: what they get.
        layers: layer index, from the end when negative, to what that layer gets.
        key_scale: scale rule of keys (:mod:`turboquant_core.scale`).
        value_scale: scale rule of values.
        key_centers: safetensors file, or preset, of the vector that each layer's keys lose, or None.
        seed: rotation seed.
        provider: kernel provider by name; None selects one.
        sink_tokens: first tokens of a sequence that are read in the model's dtype.
        recent_tokens: last tokens that are, the query's own included.
        prefill: what a prompt's own tokens are attended to: ``"raw"`` keys and values, or the ``"packed"`` pages.
        preset: what decided bits, layers and centers, to be checked against the model; None without one.
    """

    default: LayerBits = field(default_factory=LayerBits)
    boundary_layers: int = 0
    boundary: LayerChoice = "uncompressed"
    layers: tuple[tuple[int, LayerChoice], ...] = ()
    key_scale: ScaleRule = CACHE_RULE
    value_scale: ScaleRule = CACHE_RULE
    key_centers: Path | None = None
    seed: int = 42
    provider: str | None = None
    sink_tokens: int = 0
    recent_tokens: int = 0
    prefill: Prefill = "raw"
    preset: Preset | None = None

    def layer(self, index: int | None, count: int) -> LayerChoice:
        """What layer ``index`` of ``count`` gets; None, or an index beyond (a draft model's), gets the default."""
        if index is None or index >= count:
            return self.default
        at_boundary = index < self.boundary_layers or index >= count - self.boundary_layers
        named = {at % count: choice for at, choice in self.layers}
        return named.get(index, self.boundary if at_boundary else self.default)

    def check_layers(self, count: int) -> None:
        """Raise ``OptionError`` for a layer beyond the ``count`` of a model, or named twice."""
        named: dict[int, int] = {}
        for index, _ in self.layers:
            if not -count <= index < count:
                raise OptionError(
                    f"turboquant.layers names layer {index}; the model has layers {-count} to {count - 1}"
                )
            if named.setdefault(index % count, index) != index:
                raise OptionError(
                    f"turboquant.layers names layer {index % count} of {count} as {named[index % count]} and as "
                    f"{index}: drop one of them"
                )


def read_options(additional_config: object, environment: Mapping[str, str]) -> Options:
    """Options from vLLM's additional configuration, which wins, and from the environment.

    Raises:
        OptionError: an unknown key or value.
    """
    given = additional_config.get(CONFIG_KEY, {}) if isinstance(additional_config, Mapping) else {}
    if not isinstance(given, Mapping):
        raise OptionError(f"additional_config[{CONFIG_KEY!r}] is {given!r}; it must be an object of options")
    if "shaped" in given:
        raise OptionError(
            "turboquant.shaped: the plug-in has no shaped codes, because their search is no kernel and a step of vLLM "
            "stores few tokens at a time; leave it out, or use turboquant-hf, whose prompts can have them"
        )
    unknown = sorted(set(given) - set(_READERS))
    if unknown:
        raise OptionError(f"unknown turboquant option {unknown[0]!r}; the options are {', '.join(sorted(_READERS))}")
    values = {name: _READERS[name](f"turboquant.{name}", value) for name, value in given.items()}
    if "boundary" in values and not values.get("boundary_layers"):
        raise OptionError("turboquant.boundary is given without turboquant.boundary_layers: say how many layers get it")
    decided = values.pop("preset", None)
    if decided is not None:
        return Options(**decided, **_beside_preset(values))
    default = _bits_of(values, _environment_bits(environment))
    known = {f.name for f in fields(Options)}
    return Options(default=default, **{name: value for name, value in values.items() if name in known})


def _beside_preset(values: dict[str, Any]) -> dict[str, Any]:
    taken = sorted(set(values) & _DECIDED_BY_PRESET)
    if taken:
        raise OptionError(
            f"turboquant.{taken[0]} is given beside turboquant.preset, which decides it: drop one of them"
        )
    return values


def _preset(name: str, value: object) -> dict[str, Any]:
    """Fields of :class:`Options` that a preset of turboquant-core decides."""
    path = _file(name, value)
    try:
        preset = load_preset(path)
    except PresetError as error:
        raise OptionError(f"{name}: {error}") from error
    if preset.windows.start_after:
        raise OptionError(
            f"{name}: {path} packs nothing before {preset.windows.start_after} tokens, which pages of vLLM cannot do: "
            "set start_after to 0 in it"
        )
    layers = tuple((index, LayerBits(*pair)) for index, pair in sorted(preset.layers.items()))
    centers = path if preset.centers else None
    windows = {"sink_tokens": preset.windows.sink_tokens, "recent_tokens": preset.windows.recent_tokens}
    return {"default": LayerBits(*preset.bits), "layers": layers, "key_centers": centers, "preset": preset, **windows}


def _bits_of(values: Mapping[str, Any], fallback: LayerBits) -> LayerBits:
    both = values.get("bits")
    keys = values.get("k_bits", both or fallback.k_bits)
    widths = values.get("v_bits", both or fallback.v_bits)
    if "compress_v" in values:
        if values["compress_v"] and widths == RAW:
            widths = keys
        if not values["compress_v"]:
            _refuse_width(values)
            widths = RAW
    return LayerBits(keys, widths)


def _refuse_width(values: Mapping[str, Any]) -> None:
    if values.get("v_bits", RAW) != RAW:
        raise OptionError(f"turboquant.compress_v is false and turboquant.v_bits {values['v_bits']}: drop one of them")


def _environment_bits(environment: Mapping[str, str]) -> LayerBits:
    text = environment.get(BITS_VARIABLE) or "4"
    bits = _bits(BITS_VARIABLE, float(text) if _NUMBER.fullmatch(text) else text)
    compress = environment.get(COMPRESS_V_VARIABLE) or "1"
    if compress not in ("0", "1"):
        raise OptionError(f"{COMPRESS_V_VARIABLE} is {compress!r}; it must be 0 or 1")
    return LayerBits(bits, bits if compress == "1" else "raw")


def _bits(name: str, value: object) -> float:
    try:
        return check_bits(value)
    except LayoutError as error:
        raise OptionError(f"{name} is {value!r}; it must be one of {_ALLOWED_BITS}") from error


def _value_bits(name: str, value: object) -> ValueBits:
    if value == RAW:
        return "raw"
    try:
        return check_bits(value)
    except LayoutError as error:
        raise OptionError(f"{name} is {value!r}; it must be one of {_ALLOWED_BITS} or {RAW!r}") from error


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise OptionError(f"{name} is {value!r}; it must be true or false")
    return value


def _count(name: str, value: object) -> int:
    if type(value) is not int or value < 0:
        raise OptionError(f"{name} is {value!r}; it must be a number of layers, 0 or more")
    return value


def _tokens(name: str, value: object) -> int:
    if type(value) is not int or value < 0:
        raise OptionError(f"{name} is {value!r}; it must be a number of tokens, 0 for none")
    return value


def _seed(name: str, value: object) -> int:
    if type(value) is not int or not 0 <= value < 2**64:
        raise OptionError(f"{name} is {value!r}; it must be an integer in [0, 2**64)")
    return value


def _text(name: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise OptionError(f"{name} is {value!r}; it must be a name")
    return value


def _one_of(*allowed: str) -> Callable[[str, object], str]:
    def read(name: str, value: object) -> str:
        if not isinstance(value, str) or value not in allowed:
            raise OptionError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")
        return value

    return read


def _file(name: str, value: object) -> Path:
    path = Path(_text(name, value))
    if not path.is_file():
        raise OptionError(f"{name} is {str(path)!r}, which is no file on this machine")
    return path


def _choice(name: str, value: object) -> LayerChoice:
    if value == UNCOMPRESSED:
        return "uncompressed"
    if not isinstance(value, Mapping) or not value or set(value) - {"k_bits", "v_bits"}:
        raise OptionError(f"{name} is {value!r}; it must be {UNCOMPRESSED!r} or an object of k_bits and v_bits")
    keys = _bits(f"{name}.k_bits", value.get("k_bits", 4))
    return LayerBits(keys, _value_bits(f"{name}.v_bits", value.get("v_bits", keys)))


def _layers(name: str, value: object) -> tuple[tuple[int, LayerChoice], ...]:
    if not isinstance(value, Mapping):
        raise OptionError(f"{name} is {value!r}; it must be an object from layer index to bits")
    for key in value:
        if not str(key).removeprefix("-").isdecimal():
            raise OptionError(f"{name} has the key {key!r}; keys are layer indices such as 0 or -1")
    return tuple((int(key), _choice(f"{name}.{key}", choice)) for key, choice in value.items())


_READERS: dict[str, Callable[[str, object], Any]] = {
    "bits": _bits,
    "k_bits": _bits,
    "v_bits": _value_bits,
    "compress_v": _flag,
    "boundary_layers": _count,
    "boundary": _choice,
    "layers": _layers,
    "key_scale": _one_of(*SCALE_RULES),
    "value_scale": _one_of(*SCALE_RULES),
    "key_centers": _file,
    "seed": _seed,
    "provider": _text,
    "sink_tokens": _tokens,
    "recent_tokens": _tokens,
    "prefill": _one_of("raw", "packed"),
    "preset": _preset,
}
_DECIDED_BY_PRESET = {
    "bits",
    "k_bits",
    "v_bits",
    "compress_v",
    "boundary_layers",
    "boundary",
    "layers",
    "key_centers",
    "sink_tokens",
    "recent_tokens",
}
