"""The README's figures are those of the result files that its pages name."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHAPE = "32 x 32K, group 4, head_dim 128"
COLUMNS = ("fa3", "turboquant_4bit_nc", "packed_4", "packed_3", "packed_2")


def test_microseconds_of_a_decode_step() -> None:
    report = json.loads((ROOT / "benchmarks/results/kernels_h100.json").read_text())
    (row,) = (row for row in report["results"]["attention_page_128"] if row["shape"] == SHAPE)
    readme = (ROOT / "README.md").read_text()
    assert "| " + " | ".join(f"{row[column]:.0f}" for column in COLUMNS) + " |" in readme
    assert f"at commit {report['commit']}" in readme
