"""What of the kernel benchmark needs no GPU: its command line, its tables, and the rows of storing and encoding."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from turboquant_core import ReferenceProvider

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
sys.path.append(str(ROOT / "benchmarks"))

import kernels  # noqa: E402


def main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """The command without the seconds that an interpreter takes to import torch."""
    monkeypatch.setattr(sys, "argv", ["kernels.py", *arguments])
    kernels.main()


def test_help_needs_no_gpu() -> None:
    command = [sys.executable, "benchmarks/kernels.py", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--sweep" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_no_figure_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="no CUDA device"):
        main(monkeypatch)


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of every row of storing, encoding and decoding a few tokens, run on the CPU and not timed."""
    monkeypatch.setattr(kernels, "DEVICE", "cpu")
    monkeypatch.setattr(kernels, "HEAD_DIMS", (64,))
    monkeypatch.setattr(kernels, "APPEND_TOKENS", 3)
    monkeypatch.setattr(kernels, "PREFILL_TOKENS", 40)
    monkeypatch.setattr(kernels, "microseconds", lambda work: float(work() is not None))
    results: dict[str, list[dict[str, Any]]] = {"store": [], "vectors": []}
    for name, row in kernels.vector_operations(ReferenceProvider(), 16, 1e12):
        results[name].append(row())
    target = tmp_path / "kernels.json"
    target.write_text(json.dumps({"results": results}))
    return target


def test_storing_and_encoding_are_timed_with_searched_and_with_nearest_codes(written: Path) -> None:
    results = json.loads(written.read_text())["results"]
    rules, bits = ("searched", "unbiased"), (4, 3, 2)
    assert [(row["tokens"], row["bits"], row["scale_rule"]) for row in results["store"]] == [
        (tokens, width, rule) for tokens in (3, 40) for width in bits for rule in rules
    ]
    assert [(row["bits"], row["scale_rule"]) for row in results["vectors"]] == [
        (width, rule) for width in bits for rule in rules
    ]
    assert all(row["store"] == 1 and row["limit"] > 0 for row in results["store"])
    assert all(row["encode"] == row["decode"] == 1 for row in results["vectors"])


def test_processes_share_what_is_to_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    run: list[int] = []
    count = 3 * (len(kernels.SHAPES) + 6) + 54
    calls = list(kernels.run_once(ReferenceProvider(), [128, 16]))
    assert len(calls) == count
    numbered = [lambda number=number: run.append(number) for number in range(count)]
    monkeypatch.setattr(kernels, "run_once", lambda *_: iter(numbered))
    for share in range(4):
        kernels.compile_share(ReferenceProvider(), argparse.Namespace(page_sizes=[128, 16], share=share, processes=4))
    assert sorted(run) == list(range(count))


@pytest.mark.parametrize(
    ("name", "bits", "shape"),
    [("3/64/2/2/40", 3, kernels.Shape(2, 40, 2, 64)), ("2/128/16", 2, kernels.Shape(8, 32768, 16, 128))],
)
def test_a_class_of_attention_names_its_shape(name: str, bits: int, shape: kernels.Shape) -> None:
    assert kernels.attend_class(name) == (bits, shape)


def test_a_class_of_storing_names_its_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "DEVICE", "cpu")
    assert kernels.class_step(ReferenceProvider(), "store/3/64/33", 16)().shape[0] == 3


def test_the_rules_give_other_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "DEVICE", "cpu")
    layout = kernels.page_layout(kernels.Shape(1, 40, head_dim=64), 4, 16)
    pages = []
    for rule in kernels.SCALE_RULES:
        torch.manual_seed(0)
        pages.append(kernels.store_step(ReferenceProvider(), 40, layout, rule)[0]())
    assert not torch.equal(*pages)


def test_tables_of_a_file_of_an_older_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main(monkeypatch, "--report", "--json", str(RESULTS / "kernels.json"), "--plot", str(tmp_path / "plot.png"))
    assert "| tokens | bits | limit | store |" in capsys.readouterr().out
    assert (tmp_path / "plot.png").stat().st_size > 0


def test_tables_name_the_rule(
    written: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main(monkeypatch, "--report", "--json", str(written))
    printed = capsys.readouterr().out
    assert "| tokens | head_dim | bits | scale_rule | limit | store |" in printed
    assert "| 40 | 64 | 4 | unbiased |" in printed


def test_rows_of_several_commands_make_one_table() -> None:
    rows = [{"tokens": 32, "store": 1.5}, {"tokens": 32, "scale_rule": "searched", "store": 2.5}]
    assert kernels.rows_table(rows).splitlines() == [
        "| tokens | store | scale_rule |",
        "|---|---|---|",
        "| 32 | 1.5 | - |",
        "| 32 | 2.5 | searched |",
    ]


def test_instructions_of_loops_are_counted() -> None:
    from sass_encode import loop_lengths

    forward, itself = (0x40, "BRA", "`(.L_x_1) 0x60"), (0x60, "BRA", "0x60")
    loop = [(0x10, "FFMA", "R1, R2"), (0x20, "ISETP", "R1, 0x4"), (0x30, "BRA", "0x10")]
    assert loop_lengths([(0x00, "MOV", "R1, 0x10"), *loop, forward, (0x50, "EXIT", ""), itself]) == [3]
