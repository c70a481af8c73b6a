"""The demo runs, on fewer tokens, and its table says what packed caches hold."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from turboquant_core import VectorLayout
from turboquant_hf.options import RECENT_TOKENS

ROOT = Path(__file__).parents[1]
CONTEXT, NEW = 96, 4
CONFIG = json.loads((ROOT / "examples" / "models" / "tiny" / "config.json").read_text())
ROW = re.compile(r"^(16|4|3|2)-bit cache +(\d+) +([\d.]+)x +(\S+) ", flags=re.MULTILINE)
README = (ROOT / "README.md").read_text()
README_ROW = re.compile(r"^\| (16|4|3|2)-bit cache \| (\d+) \| ([\d.]+)x \|", flags=re.MULTILINE)
PNG = b"\x89PNG\r\n\x1a\n"


def token_bytes(bits: int) -> int:
    """Bytes of the keys and values of one token in all layers."""
    head_dim = CONFIG["head_dim"]
    vector = 2 * head_dim if bits == 16 else VectorLayout(head_dim, bits, "int8").nbytes
    return CONFIG["num_hidden_layers"] * 2 * CONFIG["num_key_value_heads"] * vector


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def output(folder: Path) -> str:
    sizes = ("--context", str(CONTEXT), "--score", "32", "--new-tokens", str(NEW))
    command = [sys.executable, "examples/demo.py", *sizes, "--output", str(folder)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "comparing caches: 100%" in done.stderr
    return done.stdout


def test_bytes_and_compression_are_true(output: str) -> None:
    rows = {int(bits): (int(size), float(ratio)) for bits, size, ratio, _ in ROW.findall(output)}
    assert_bytes(rows, CONTEXT, NEW)


def test_bytes_of_the_readme_are_those_of_its_context() -> None:
    """The quality beside them needs the whole demo, which no test runs."""
    rows = {int(bits): (int(size), float(ratio)) for bits, size, ratio in README_ROW.findall(README)}
    context = re.search(r"After a prompt of (\d+) tokens", README)
    assert context is not None
    assert_bytes(rows, int(context[1]), 64)


def assert_bytes(rows: dict[int, tuple[int, float]], context: int, new: int) -> None:
    assert list(rows) == [16, 4, 3, 2]
    held = context + new - 1  # the last token is not fed
    stock = held * token_bytes(16)
    assert rows[16] == (stock, 1.0)
    center = CONFIG["num_key_value_heads"] * CONFIG["head_dim"] * 4  # of the keys of a layer, where they have an offset
    for bits in (4, 3, 2):
        stored, ratio = rows[bits]
        tokens = (held - RECENT_TOKENS) * token_bytes(bits) + RECENT_TOKENS * token_bytes(16)
        assert stored - tokens in [layers * center for layers in range(CONFIG["num_hidden_layers"] + 1)]
        assert ratio == round(stock / stored, 2)


def test_every_cache_has_its_text_and_divergence(output: str) -> None:
    assert re.findall(r"^(\d+)-bit cache:$", output, flags=re.MULTILINE) == ["16", "4", "3", "2"]
    divergences = [divergence for *_, divergence in ROW.findall(output)]
    assert divergences[0] == "-"
    assert all(0 <= float(divergence) < 1 for divergence in divergences[1:])


def test_speeds_are_positive_and_called_variable(output: str) -> None:
    speeds = [float(line.split()[-1]) for line in output.splitlines() if ROW.match(line)]
    assert len(speeds) == 4
    assert min(speeds) > 0
    assert "of the median step" in output
    assert "vary from run to run and from machine to machine" in " ".join(output.split())


@pytest.mark.parametrize(
    "arguments", [["--model", "nowhere"], ["--text", "nowhere.txt"], ["--new-tokens", "1"], ["--threads", "0"]]
)
def test_wrong_arguments_are_one_line(arguments: list[str]) -> None:
    command = [sys.executable, "examples/demo.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert re.search(rf"error: {arguments[0]} (is )?{arguments[1]}", done.stderr.splitlines()[-1])


def test_the_plot_is_written(output: str, folder: Path) -> None:
    assert f"Memory against context: {folder / 'memory.png'}" in output
    assert (folder / "memory.png").read_bytes().startswith(PNG)
