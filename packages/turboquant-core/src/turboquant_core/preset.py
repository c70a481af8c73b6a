"""What to use for one model's cache, as a file: bits, layers to spare, windows, key centres.

``turboquant doctor`` writes it; :func:`load_preset` reads and checks it. The file is JSON; a centre is the base64 of
little-endian float32 ``[kv_heads, head_dim]``.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._version import __version__
from .errors import TurboQuantError
from .layout import check_bits
from .windows import Windows

FORMAT = "turboquant-preset"
VERSION = 1


class PresetError(TurboQuantError, ValueError):
    """A preset cannot be read, or belongs to another model."""


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """The model that a preset was made for.

    Attributes:
        model_type: of its configuration, ``"llama"`` for instance.
        layers: decoder layers.
        kv_heads: KV heads of a layer.
        head_dim: coordinates of a key.
        hidden_size: of the model.
        vocab_size: of the model.
    """

    model_type: str
    layers: int
    kv_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int

    @classmethod
    def of(cls, config: Any) -> Fingerprint:
        """The fingerprint of a Transformers configuration (its text part).

        Raises:
            PresetError: the configuration lacks one of the numbers.
        """
        text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
        try:
            heads = int(text.num_attention_heads)
            kv_heads = getattr(text, "num_key_value_heads", None) or heads
            head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
            return cls(
                str(text.model_type),
                int(text.num_hidden_layers),
                int(kv_heads),
                int(head_dim),
                int(text.hidden_size),
                int(text.vocab_size),
            )
        except AttributeError as error:
            raise PresetError(f"the configuration of {type(config).__name__} names no {error.name}") from error


@dataclass(frozen=True, slots=True, eq=False)
class Preset:
    """A recommendation for one model.

    Attributes:
        model: whose.
        bits: (keys, values) of every layer that ``layers`` does not name.
        layers: (keys, values) of the layers to spare.
        windows: tokens in full precision.
        centers: float32 ``[kv_heads, head_dim]`` that the keys of a layer lose; a layer that it lacks is not centred.
        measured: what the recommendation rests on, numbers by name.
    """

    model: Fingerprint
    bits: tuple[float, float]
    layers: Mapping[int, tuple[float, float]] = field(default_factory=dict)
    windows: Windows = Windows()  # noqa: RUF009 (immutable)
    centers: Mapping[int, Tensor] = field(default_factory=dict)
    measured: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for pair in (self.bits, *self.layers.values()):
            if len(pair) != 2:
                raise PresetError(f"bits are {pair!r}; they must be a pair (keys, values)")
            for bits in pair:
                check_bits(bits)
        for name, layers in (("layers", self.layers), ("centers", self.centers)):
            beyond = [index for index in layers if not 0 <= index < self.model.layers]
            if beyond:
                raise PresetError(f"{name} names layer {beyond[0]}; the model has layers 0 to {self.model.layers - 1}")
        shape = (self.model.kv_heads, self.model.head_dim)
        for index, center in self.centers.items():
            if tuple(center.shape) != shape or not bool(center.isfinite().all()):
                raise PresetError(f"the centre of layer {index} is {tuple(center.shape)}; it must be finite {shape}")

    def layer_bits(self, index: int) -> tuple[float, float]:
        """Bits of the keys and of the values of a layer."""
        return self.layers.get(index, self.bits)

    def check(self, config: Any) -> None:
        """Raise :class:`PresetError` unless the preset was made for the model of this configuration."""
        found = Fingerprint.of(config)
        for name in Fingerprint.__slots__:
            mine, theirs = getattr(self.model, name), getattr(found, name)
            if mine != theirs:
                raise PresetError(
                    f"the preset is for a model with {name} {mine}, this one has {theirs}: run turboquant doctor on it"
                )


def save_preset(preset: Preset, path: str | PathLike[str]) -> None:
    """Write ``preset`` as JSON."""
    Path(path).write_text(json.dumps(_to_json(preset), indent=1) + "\n", encoding="utf-8")


def load_preset(path: str | PathLike[str]) -> Preset:
    """Read a preset.

    Raises:
        PresetError: no such file, not a preset, another version of the format, or a field outside its range.
    """
    try:
        body = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise PresetError(f"{path} is no preset: {error}") from error
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise PresetError(f"{path} is no preset: it does not say format {FORMAT!r}")
    if body.get("version") != VERSION:
        raise PresetError(f"{path} has preset version {body.get('version')!r}; this release reads {VERSION}")
    try:
        return _from_json(body)
    except (KeyError, TypeError, ValueError) as error:
        missing = f"it has no {error}" if isinstance(error, KeyError) else error
        raise PresetError(f"{path} is a damaged preset: {missing}") from error


def _to_json(preset: Preset) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "turboquant_core": __version__,
        "model": {name: getattr(preset.model, name) for name in Fingerprint.__slots__},
        "bits": list(preset.bits),
        "layers": {str(index): list(pair) for index, pair in sorted(preset.layers.items())},
        "windows": {name: getattr(preset.windows, name) for name in Windows.__slots__},
        "measured": dict(preset.measured),
        "centers": {str(index): _encode(center) for index, center in sorted(preset.centers.items())},
    }


def _from_json(body: dict[str, Any]) -> Preset:
    model = Fingerprint(**body["model"])
    shape = (model.kv_heads, model.head_dim)
    return Preset(
        model=model,
        bits=_pair(body["bits"]),
        layers={int(index): _pair(pair) for index, pair in body["layers"].items()},
        windows=Windows(**body["windows"]),
        centers={int(index): _decode(text, shape) for index, text in body["centers"].items()},
        measured={str(name): float(number) for name, number in body["measured"].items()},
    )


def _pair(bits: Any) -> tuple[float, float]:
    keys, values = bits
    return check_bits(keys), check_bits(values)


def _encode(center: Tensor) -> str:
    return base64.b64encode(center.cpu().float().numpy().astype("<f4").tobytes()).decode("ascii")


def _decode(text: str, shape: tuple[int, int]) -> Tensor:
    try:
        data = base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise PresetError(f"a centre is no base64: {error}") from error
    if len(data) != 4 * shape[0] * shape[1]:
        raise PresetError(f"a centre has {len(data)} bytes; float32 {shape} has {4 * shape[0] * shape[1]}")
    return torch.from_numpy(np.frombuffer(data, dtype="<f4").astype(np.float32).reshape(shape))
