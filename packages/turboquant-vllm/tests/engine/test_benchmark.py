"""``benchmarks/serving.py --quick``: both contenders run, and random traffic loses and changes nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .conftest import ENVIRONMENT, ROOT

pytestmark = pytest.mark.slow


def results(folder: Path, *arguments: str) -> dict[str, Any]:
    out = folder / "results.json"
    command = [sys.executable, str(ROOT / "benchmarks/serving.py"), "--quick", "--out", str(out), *arguments]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(out.read_text())["results"]
    return found


def test_timing(tmp_path: Path) -> None:
    found = results(tmp_path)
    full, packed = found["bf16"], found["turboquant-4bit"]
    assert packed["blocks"] * packed["block_size"] == pytest.approx(
        full["blocks"] * full["block_size"] * 256 / 68, rel=0.01
    )
    for result in (full, packed):
        assert all(run["prefill_s"] > 0 and run["token_ms"] > 0 for run in result["workloads"].values())


def test_soak(tmp_path: Path) -> None:
    found = results(tmp_path, "--soak", "0.5")["soak"]
    assert found["passed"], found["failures"]
    assert found["preemptions"] > 0
    assert found["all_blocks_free"]
    assert found["sent"] == found["done"] + found["cancelled"]
