"""A cache in a file: safetensors with a header that is checked; nothing in it is executed."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig

from turboquant_core import LAYOUT_VERSION, TurboQuantError

from .layer import TurboQuantLayer
from .packed_layer import LayerShape
from .sliding_layer import TurboQuantSlidingLayer
from .special_layer import StateBeside

FORMAT = "turboquant-cache"
FORMAT_VERSION = 1
_MAKE_IT_ALIKE = "load it into a cache of the model and the options that it was saved from"
_VOLATILE = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"}
_DTYPES = {str(dtype): dtype for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}


class CacheFileError(TurboQuantError, ValueError):
    """A file is not a cache, not a whole one, or one of another model or of other options."""


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
    layout = layer.store.layout
    shape = [layer.store.batch, layout.kv_heads, layout.key.head_dim, layout.value.head_dim, str(layer.dtype)]
    seen = layer.cumulative_length if isinstance(layer, TurboQuantSlidingLayer) else layer.store.length
    return {**expected, "shape": shape, "packed": layer.store.packed.length, "seen": seen}


def _layer_tensors(index: int, layer: TurboQuantLayer) -> dict[str, Tensor]:
    store = layer.store
    if store is None:
        return {}
    tensors = {
        "pages": store.packed.export(),
        "recent_keys": store.recent.keys,
        "recent_values": store.recent.values,
        "sink_keys": store.sinks.kept.keys,
        "sink_values": store.sinks.kept.values,
        "sink_starts": store.sinks.starts,
    }
    if store.codec.key.center is not None:
        tensors["center"] = store.codec.key.center
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
    _check_target(Path(path))
    packed = _packed_layers(layers)
    header = {**header, "layout_version": LAYOUT_VERSION, "layers": [_layer_header(layer) for layer in packed]}
    tensors = {name: x for index, layer in enumerate(packed) for name, x in _layer_tensors(index, layer).items()}
    if ids is not None:
        tensors["ids"] = ids.detach().cpu().contiguous()
    _write(Path(path), tensors, {"format": FORMAT, "version": str(FORMAT_VERSION), "header": json.dumps(header)})


def _check_target(path: Path) -> None:
    """Before anything is copied or written, say what is in the way of a new file."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, and nothing was saved: give the path of a file in it")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent}, and nothing was saved: create it, or name another")


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        save_file(tensors, temporary, metadata=metadata)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors, if the file is a cache of this version."""
    if path.is_dir():
        raise CacheFileError(f"{path} is a folder: give the path of the file that save() wrote")
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}: give the path of the file that save() wrote")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise CacheFileError(f"{path} is a safetensors file, but not a packed cache")
            if metadata.get("version") != str(FORMAT_VERSION):
                raise CacheFileError(
                    f"{path} has format version {metadata.get('version')}; this release reads {FORMAT_VERSION}: load "
                    "it with the release that saved it"
                )
            return json.loads(metadata["header"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise CacheFileError(
            f"{path} is not a whole packed cache ({error}): save it again, or run its prompt over an empty cache"
        ) from error


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
    found, tensors = _read(Path(path))
    _check_header(Path(path), found, header, packed)
    try:
        for index, (layer, saved) in enumerate(zip(packed, found["layers"], strict=True)):
            if "shape" in saved:
                own = {name: tensors[f"{index}.{name}"] for name in _names(index, tensors)}
                _fill(layer, saved, own, device)
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        for layer in packed:
            layer.reset()
        raise CacheFileError(
            f"{path} does not hold what its header says ({error}): it was changed after it was saved; save it again"
        ) from error
    return tensors.get("ids")


def _names(index: int, tensors: dict[str, Tensor]) -> list[str]:
    prefix = f"{index}."
    return [name.removeprefix(prefix) for name in tensors if name.startswith(prefix)]


def _fill(layer: TurboQuantLayer, saved: dict[str, Any], tensors: dict[str, Tensor], device: torch.device) -> None:
    batch, kv_heads, head_dim, value_head_dim, dtype = saved["shape"]
    shape = LayerShape(batch, kv_heads, head_dim, value_head_dim, _DTYPES[dtype])
    layer.create_store(shape, device, tensors.get("center"))
    store = layer.packed_sequences
    store.packed.adopt(tensors["pages"], saved["packed"])
    store.adopt_exact(
        *(tensors[f"recent_{name}"] for name in ("keys", "values")),
        *(tensors[f"sink_{name}"] for name in ("keys", "values", "starts")),
    )
    if isinstance(layer, TurboQuantSlidingLayer):
        layer.restore(saved["seen"])
