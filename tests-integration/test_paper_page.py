"""The tables of docs/paper.md are those of benchmarks/results/paper.json, a run of a commit without changes."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

from report import table  # noqa: E402

WHOLE = ("distortions", "nearest_neighbours", "fractional_bits")


@pytest.fixture
def run() -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks" / "results" / "paper.json").read_text())


@pytest.fixture
def rows(run: dict[str, Any]) -> dict[str, list[str]]:
    """Lines of the table of each part, its header first, as the benchmark prints them."""
    parts = run["results"].items()
    return {name: table(list(part[0]), [list(row.values()) for row in part]).splitlines() for name, part in parts}


def page() -> list[str]:
    return [line for line in (ROOT / "docs" / "paper.md").read_text().splitlines() if line.startswith("|")]


def test_every_row_of_the_page_is_of_the_run(rows: dict[str, list[str]]) -> None:
    assert set(page()) <= {line for lines in rows.values() for line in lines}


def test_the_page_shows_whole_tables(rows: dict[str, list[str]]) -> None:
    assert {line for name in WHOLE for line in rows[name]} <= set(page())


def test_the_run_can_be_repeated(run: dict[str, Any]) -> None:
    assert re.fullmatch(r"[0-9a-f]{7,40}", run["commit"])
    assert run["command"] == "python benchmarks/paper.py"
