"""Layers of a cache in a file, and back: everything in its header is checked against the cache that reads it."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from turboquant_core import LAYOUT_VERSION

from .cache_file import DIGEST, CacheFileError, check_target, digest, read, write
from .layer import Held, TurboQuantLayer
from .packed_layer import LayerShape
from .sliding_layer import TurboQuantSlidingLayer
from .special_layer import StateBeside

_MAKE_IT_ALIKE = "load it into a cache of the model and the options that it was saved from"
_VOLATILE = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"}
_DTYPES = {str(dtype): dtype for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}


def fingerprint(config: PreTrainedConfig) -> str:
    """SHA-256 of what a configuration says about the text model; files and precision left out."""
    settings = config.get_text_config(decoder=True).to_dict()
    kept = {name: value for name, value in settings.items() if name not in _VOLATILE}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()


def _layer_header(layer: TurboQuantLayer) -> dict[str, Any]:
    """What must agree before the tensors of a layer are read."""
    expected = {
        "bits": list(layer.bits),
        "packs_values": layer.packs_values,
        "windows": [layer.windows.sink_tokens, layer.windows.recent_tokens, layer.windows.start_after],
        "window": layer.window,
    }
    if layer.store is None:
        return expected
    was = layer.shape
    shape = [was.batch, was.kv_heads, was.head_dim, was.value_head_dim, str(was.dtype)]
    seen = layer.cumulative_length if isinstance(layer, TurboQuantSlidingLayer) else layer.store.length
    return {**expected, "shape": shape, "packed": layer.store.packed.length, "seen": seen}


def _layer_tensors(index: int, layer: TurboQuantLayer) -> dict[str, Tensor]:
    if layer.store is None:
        return {}
    tensors = layer.held().tensors
    return {f"{index}.{name}": tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _packed_layers(layers: list[Any]) -> list[TurboQuantLayer]:
    other = [
        f"{index} ({type(layer).__name__})"
        for index, layer in enumerate(layers)
        if not isinstance(layer, TurboQuantLayer) or isinstance(layer, StateBeside)
    ]
    if other:
        raise CacheFileError(
            f"layers {', '.join(other)} are not packed as a whole, and only packed keys and values are saved; sliding-"
            "window layers are packed with compress_sliding=True"
        )
    return layers


def save_layers(path: str | os.PathLike[str], layers: list[Any], header: dict[str, Any], ids: Tensor | None) -> None:
    """Write a cache; the file appears whole or not at all.

    Raises:
        CacheFileError: a layer is not packed.
        OSError: ``path`` is a folder or lies in none, or cannot be written; nothing is left of it then.
    """
    check_target(Path(path))
    packed = _packed_layers(layers)
    header = {**header, "layout_version": LAYOUT_VERSION, "layers": [_layer_header(layer) for layer in packed]}
    tensors = {name: x for index, layer in enumerate(packed) for name, x in _layer_tensors(index, layer).items()}
    if ids is not None:
        tensors["ids"] = ids.detach().cpu().contiguous()
    write(Path(path), tensors, header)


def _check_header(path: Path, found: dict[str, Any], header: dict[str, Any], layers: list[TurboQuantLayer]) -> None:
    for name, expected in {**header, "layout_version": LAYOUT_VERSION}.items():
        if found.get(name) != expected:
            raise CacheFileError(
                f"{path} has {name} {found.get(name)!r}; this cache has {expected!r}: {_MAKE_IT_ALIKE}"
            )
    saved = found.get("layers")
    if not isinstance(saved, list) or len(saved) != len(layers):
        raise CacheFileError(f"{path} does not have the {len(layers)} layers of this model")
    for index, (layer, was) in enumerate(zip(layers, saved, strict=True)):
        for name, expected in _layer_header(layer).items():
            if not isinstance(was, dict) or was.get(name) != expected:
                got = was.get(name) if isinstance(was, dict) else was
                raise CacheFileError(
                    f"{path} has {name} {got!r} in layer {index}; this cache has {expected!r}: {_MAKE_IT_ALIKE}"
                )


def load_layers(
    path: str | os.PathLike[str], layers: list[Any], header: dict[str, Any], device: torch.device
) -> Tensor | None:
    """Fill empty layers from a file.

    Returns:
        The token ids that the cache holds, if they were known.

    Raises:
        CacheFileError: see the class, or ``path`` is a folder; no layer is filled then.
        FileNotFoundError: there is no such file.
    """
    packed = _packed_layers(layers)
    found, tensors = read(Path(path))
    _check_header(Path(path), found, header, packed)
    if digest(tensors) != found.get(DIGEST):
        raise CacheFileError(
            f"{path} holds other bytes than were saved (SHA-256 {found.get(DIGEST)}): copy it again, or save it again"
        )
    try:
        for index, (layer, saved) in enumerate(zip(packed, found["layers"], strict=True)):
            if "shape" in saved:
                own = {name: tensors[f"{index}.{name}"] for name in _names(index, tensors)}
                _fill(layer, saved, own, device)
        ids = tensors.get("ids")
        _check_whole(packed, ids)
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        for layer in packed:
            layer.reset()
        raise CacheFileError(
            f"{path} does not hold what its header says ({error}): it was changed after it was saved; save it again"
        ) from error
    return ids


def _check_whole(layers: list[TurboQuantLayer], ids: Tensor | None) -> None:
    """Raise ``ValueError`` when layers hold different texts, or ``ids`` are no token ids of as many sequences."""
    held = {(0, 0) if layer.store is None else (layer.store.batch, layer.get_seq_length()) for layer in layers}
    if len(held) > 1:
        raise ValueError(f"its layers hold (sequences, tokens) {sorted(held)}")
    batch = next(iter(held))[0]
    if ids is not None and (ids.dim() != 2 or ids.dtype != torch.int64 or len(ids) != batch):
        raise ValueError(f"token ids are {ids.dtype} {tuple(ids.shape)} for {batch} sequences")


def _names(index: int, tensors: dict[str, Tensor]) -> list[str]:
    prefix = f"{index}."
    return [name.removeprefix(prefix) for name in tensors if name.startswith(prefix)]


def _fill(layer: TurboQuantLayer, saved: dict[str, Any], tensors: dict[str, Tensor], device: torch.device) -> None:
    batch, kv_heads, head_dim, value_head_dim, dtype = saved["shape"]
    for number in (batch, kv_heads, head_dim, value_head_dim, saved["packed"], saved["seen"]):
        if type(number) is not int or number < 0:
            raise ValueError(f"{number!r} is no number of anything")
    shape = LayerShape(batch, kv_heads, head_dim, value_head_dim, _DTYPES[dtype])
    layer.adopt(shape, device, Held(saved["packed"], tensors))
    if isinstance(layer, TurboQuantSlidingLayer):
        layer.restore(saved["seen"])
    elif layer.get_seq_length() != saved["seen"]:
        raise ValueError(f"{layer.get_seq_length()} tokens are held of {saved['seen']}")
