"""The caches that `retrieval.py` asks: widths, windows and presets from its command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import DynamicCache

from turboquant_core import Windows
from turboquant_core.layout import check_bits
from turboquant_core.preset import load_preset
from turboquant_hf import patch_model, unpatch_model

FULL = "full precision"
BITS = [(4.0, 4.0), (3.0, 3.0), (2.0, 2.0)]

Pair = tuple[float, float]
MakeCache = Callable[[Any], Any]


def two(kind: Callable[[str], Any], text: str) -> tuple[Any, ...]:
    """Two numbers with a comma between them."""
    numbers = tuple(kind(part) for part in text.split(","))
    if len(numbers) != 2:
        raise argparse.ArgumentTypeError(f"{text!r} are {len(numbers)} numbers, not two with a comma between them")
    return numbers


def width(text: str) -> Pair:
    """Bits of keys and values: ``4``, or ``3,2``."""
    try:
        keys, values = two(float, text if "," in text else f"{text},{text}")
        return check_bits(keys), check_bits(values)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no width: {error}; give KEYS,VALUES or one for both") from error


def window(text: str) -> tuple[int, int]:
    """Sinks and recent tokens: ``4,16``."""
    try:
        sinks, recent = two(int, text)
        Windows(sinks, recent)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} are no windows: {error}; give SINKS,RECENT") from error
    return sinks, recent


def stock_cache(model: Any) -> DynamicCache:
    """Full precision: the reference of every share."""
    unpatch_model(model)
    return DynamicCache(config=model.config)


def packed(bits: Pair | Path, seed: int, **options: Any) -> MakeCache:
    """Makes packed caches; what verification would say is what this benchmark measures."""
    return lambda model: patch_model(model, bits, verify=False, seed=seed, **options)


def width_name(pair: Pair) -> str:
    """Of keys and values, told apart where they differ."""
    return f"{pair[0]:g} bit" if pair[0] == pair[1] else f"keys {pair[0]:g}, values {pair[1]:g} bit"


OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "defaults": ("", {}),
    "packed alone": (", packed alone", {"recent_tokens": 0, "center_keys": False}),
    "shaped": (", shaped", {"shaped": True}),
}
"""What the name of a cache says of a variant, and its options; those of ``windows`` follow from their sizes."""


def windowed(sinks: int, recent: int) -> tuple[str, dict[str, Any]]:
    """Name and options of centred keys and windows."""
    options = {"sink_tokens": sinks, "recent_tokens": recent, "center_keys": True}
    return f", centred keys, windows {sinks} + {recent}", options


VARIANTS = (*OPTIONS, "windows")


def caches(
    bits: list[Pair], windows: list[tuple[int, int]], variants: list[str], presets: list[Path], seed: int
) -> dict[str, MakeCache]:
    """Full precision, then each width in each of the ``variants``, then each preset."""
    found: dict[str, MakeCache] = {FULL: stock_cache}
    for pair in bits:
        for variant in variants:
            sized = [windowed(*sizes) for sizes in windows] if variant == "windows" else [OPTIONS[variant]]
            for name, options in sized:
                found[width_name(pair) + name] = packed(pair, seed, **options)
    for path in presets:
        found[preset_name(path)] = packed(path, seed)
    return found


def preset_name(path: Path) -> str:
    """What a preset decides, in words; layers that it names have bits of their own."""
    preset = load_preset(path)
    windows = f", windows {preset.windows.sink_tokens} + {preset.windows.recent_tokens}" if preset.windows else ""
    own, centred = ", bits by layer" if preset.layers else "", ", centred keys" if preset.centers else ""
    return f"preset {path.stem}: {width_name(preset.bits)}{own}{centred}{windows}"
