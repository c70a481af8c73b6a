"""The README's figures are those of the newest result file."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHAPE = "32 x 32K, group 4, head_dim 128"
COLUMNS = ("packed_4", "packed_3", "packed_2")


def test_microseconds_of_a_decode_step() -> None:
    report = json.loads((ROOT / "benchmarks/results/kernels_h100.json").read_text())
    (row,) = (row for row in report["results"]["attention_page_128"] if row["shape"] == SHAPE)
    lines = (ROOT / "README.md").read_text().splitlines()
    first = next(line for line in lines if line.startswith(f"| {report['device']} | "))
    assert first.startswith(f"| {report['device']} | {report['commit']} | {row['fa3']:.0f} |")
    assert first.endswith(" | " + " | ".join(f"{row[column]:.0f}" for column in COLUMNS) + " |")
