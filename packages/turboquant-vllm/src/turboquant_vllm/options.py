"""What a user chooses: ``--additional-config '{"turboquant": {...}}'`` and two environment variables."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias

from turboquant_core.preset import Preset, PresetError, load_preset
from turboquant_core.scale import CACHE_RULE, SCALE_RULES, ScaleRule

from .errors import OptionError
from .option_values import (
    bits_or_raw_value,
    bits_value,
    choice_value,
    count_value,
    file_value,
    flag_value,
    layers_value,
    one_of,
    seed_value,
    text_value,
    tokens_value,
)
from .widths import RAW, UNCOMPRESSED, LayerBits, LayerChoice, ValueBits

__all__ = [
    "BITS_VARIABLE",
    "COMPRESS_V_VARIABLE",
    "CONFIG_KEY",
    "RAW",
    "UNCOMPRESSED",
    "LayerBits",
    "LayerChoice",
    "Options",
    "Prefill",
    "ValueBits",
    "read_options",
]

CONFIG_KEY = "turboquant"
BITS_VARIABLE = "TURBOQUANT_BITS"
COMPRESS_V_VARIABLE = "TURBOQUANT_COMPRESS_V"

Prefill: TypeAlias = Literal["raw", "packed"]

_NUMBER = re.compile(r"\d+(\.\d+)?")


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
    path = file_value(name, value)
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
    bits = bits_value(BITS_VARIABLE, float(text) if _NUMBER.fullmatch(text) else text)
    compress = environment.get(COMPRESS_V_VARIABLE) or "1"
    if compress not in ("0", "1"):
        raise OptionError(f"{COMPRESS_V_VARIABLE} is {compress!r}; it must be 0 or 1")
    return LayerBits(bits, bits if compress == "1" else "raw")


_READERS: dict[str, Callable[[str, object], Any]] = {
    "bits": bits_value,
    "k_bits": bits_value,
    "v_bits": bits_or_raw_value,
    "compress_v": flag_value,
    "boundary_layers": count_value,
    "boundary": choice_value,
    "layers": layers_value,
    "key_scale": one_of(*SCALE_RULES),
    "value_scale": one_of(*SCALE_RULES),
    "key_centers": file_value,
    "seed": seed_value,
    "provider": text_value,
    "sink_tokens": tokens_value,
    "recent_tokens": tokens_value,
    "prefill": one_of("raw", "packed"),
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
