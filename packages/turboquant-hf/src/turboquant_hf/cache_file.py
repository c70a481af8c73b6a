"""The file of a cache: safetensors with a header; nothing in it is executed."""

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

from turboquant_core import TurboQuantError

FORMAT = "turboquant-cache"
FORMAT_VERSION = 1
DIGEST = "sha256"


class CacheFileError(TurboQuantError, ValueError):
    """A file is not a cache, not a whole one, or one of another model or of other options."""


def check_target(path: Path) -> None:
    """Before anything is copied or written, say what is in the way of a new file."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, and nothing was saved: give the path of a file in it")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent}, and nothing was saved: create it, or name another")


def digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of contiguous tensors of the CPU, in the order of their names."""
    sums = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sums.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if tensor.numel():
            sums.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sums.hexdigest()


def write(path: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    """Write a file, which appears whole or not at all; its header has the digest of the tensors besides."""
    header = {**header, DIGEST: digest(tensors)}
    metadata = {"format": FORMAT, "version": str(FORMAT_VERSION), "header": json.dumps(header)}
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        save_file(tensors, temporary, metadata=metadata)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors.

    Raises:
        CacheFileError: the file is not a whole cache of this version.
        FileNotFoundError: there is none.
    """
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
            return _header_in(metadata), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except CacheFileError:
        raise
    except (SafetensorError, KeyError, ValueError, RecursionError) as error:
        raise CacheFileError(
            f"{path} is not a whole packed cache ({error}): save it again, or run its prompt over an empty cache"
        ) from error


def _header_in(metadata: dict[str, str]) -> dict[str, Any]:
    header = json.loads(metadata["header"])
    if not isinstance(header, dict):
        raise ValueError(f"its header is a {type(header).__name__}")
    return header
