"""docs/compatibility.md is what the expectations say; the expectations say that nothing differs."""

from __future__ import annotations

from pathlib import Path

import pytest

from .expectations import FOLDER, MULTIMODAL, differences, newest_file, read_rows
from .page import PAGE, page
from .row import Row
from .subset import SUBSET

FILES = sorted(FOLDER.glob("*.json"))


@pytest.mark.skipif(not PAGE.parent.exists(), reason="a source distribution holds no documentation")
def test_the_page_is_made_from_the_expectations() -> None:
    assert PAGE.read_text() == page()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_subset_is_expected(file: Path) -> None:
    assert set(SUBSET) <= read_rows(file).keys()


@pytest.mark.parametrize(
    ("now", "line"),
    [
        (Row("m", patched={"decoded": 2}, modes={"greedy": "equal"}), "patched was {'fused': 2}, is {'decoded': 2}"),
        (Row("m", patched={"fused": 2}, modes={"greedy": "differs: 1e-01"}), "differs: 1e-01"),
        (Row("m", refused="no packed cache: ValueError"), "refused was None, is no packed cache"),
    ],
    ids=["slower path", "other tokens", "refusal"],
)
def test_a_regression_is_named(now: Row, line: str) -> None:
    before = Row("m", patched={"fused": 2}, modes={"greedy": "equal"})
    assert not differences({"m": before}, {"m": before})
    assert line in "\n".join(differences({"m": before}, {"m": now}))
    assert "no expectation" in differences({}, {"m": now})[0]


def test_every_tested_row_of_the_newest_release_is_accounted_for() -> None:
    rows = {**read_rows(newest_file()), **read_rows(newest_file(MULTIMODAL))}
    assert all(row.refused or row.modes for row in rows.values())


@pytest.mark.parametrize("file", [*FILES, *sorted(MULTIMODAL.glob("*.json"))], ids=lambda file: file.stem)
def test_no_expectation_is_a_difference(file: Path) -> None:
    """Of a mode that the stock model can do, the packed cache must give its tokens and logits."""
    rows = read_rows(file)
    assert not [name for name, row in rows.items() if row.modes and not row.is_equal]
    assert not [name for name, row in rows.items() if (row.static or "").startswith("differs")]
