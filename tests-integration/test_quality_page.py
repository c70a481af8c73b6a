"""The tables of docs/quality.md are those of benchmarks/results, and what they derive is derived as they say."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import quality_page  # noqa: E402
from page_blocks import BLOCK, load, read, verdict  # noqa: E402
from quality_page import PAGE, at_bits, best_rival, filled  # noqa: E402
from retrieval import figures, interval  # noqa: E402


def test_the_page_shows_what_was_measured() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert len(BLOCK.findall(page)) > 20
    assert filled(page) == page, "run python benchmarks/quality_page.py"


def test_an_empty_table_is_filled_and_swallows_nothing() -> None:
    mark = "<!-- quality_lab.json agreement -->\n\n"
    page = f"{mark}<!-- end -->\n\nkept\n\n{mark}| old |\n\n<!-- end -->\n"
    (first, second) = BLOCK.findall(page)
    assert first == second
    found = filled(page)
    assert "\n\n<!-- end -->\n\nkept\n\n" in found
    assert found.count("| bits |") == 2
    assert "| old |" not in found
    assert filled(found) == found


def test_no_table_of_figures_is_typed_in() -> None:
    rest = BLOCK.sub("", PAGE.read_text(encoding="utf-8"))
    assert "| method |" not in rest
    assert "| cache |" not in rest


def test_results_name_a_clean_commit() -> None:
    files = {block["file"] for block in BLOCK.finditer(PAGE.read_text(encoding="utf-8"))}
    for name in (name for name in files if name.endswith(".json")):
        commit = load(name)["commit"]
        assert commit, name
        assert "dirty" not in commit, name


@pytest.mark.parametrize(("bits", "expected"), [(2.0, None), (2.5, 0.3), (3.0, 0.3 / math.e), (3.5, 0.3 / math.e**2)])
def test_a_rival_between_its_widths_is_log_linear(bits: float, expected: float | None) -> None:
    found = at_bits([(3.5, 0.3 / math.e**2), (2.5, 0.3)], bits)
    assert found == (None if expected is None else pytest.approx(expected))


def test_beyond_its_widest_format_a_rival_is_taken_as_it_is() -> None:
    assert at_bits([(2.5, 0.3), (3.5, 0.1)], 4.1) == 0.1


def test_the_best_rival_has_no_more_bits_and_windows_only_against_windows() -> None:
    rows = [
        {"method": "full precision", "bits": 16, "KL": 0.0},
        {"method": "turboquant, 2 bit", "bits": 2.1, "KL": 0.001},
        {"method": "a, 2 bit", "bits": 2.1, "KL": 0.5},
        {"method": "b, 2 bit", "bits": 2.2, "KL": 0.2},
        {"method": "a, 2 bit, windows 4 + 8", "bits": 2.2, "KL": 0.1},
    ]
    assert best_rival(rows, 2.1) == 0.5
    assert best_rival(rows, 2.3) == 0.2
    assert best_rival(rows, 2.3, windows=True) == 0.1


def test_verdicts() -> None:
    assert verdict(0.016, 0.016) == "0.016 (met)"
    assert verdict(0.01601, 0.016) == "0.01601 (missed)"
    assert verdict(0.96, 0.95, least=True) == "0.96 (met)"
    assert verdict(0.94, 0.95, least=True) == "0.94 (missed)"


def test_windows_that_cost_too_much_are_named() -> None:
    assert quality_page.too_wide({"bits": 2.166, "KL": 0.1}, 2.125) is None
    said = quality_page.too_wide({"bits": 2.1786, "KL": 0.1}, 2.125)
    assert said == "0.1 (does not count: 2.5 % more bytes, 2 % allowed)"
    (row,) = (line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| KL with windows, 2"))
    assert row.count("more bytes") == 1


def test_the_interval_is_wilsons() -> None:
    # Newcombe (1998), table I: 81 of 263 and 0 of 20.
    assert interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)


def test_needles_are_compared_prompt_by_prompt() -> None:
    found = figures([True, False, False, True, True], [True, True, False, False, True])
    assert (found["prompts"], found["right"], found["lost"], found["won"]) == (5, 3, 1, 1)


def test_needles_are_counted_by_depth() -> None:
    found = figures([True, False, True, True], [True] * 4, 3.5, [1.0, 0.25, 0.25, 1.0])
    assert found["right_by_depth"] == {"0.25": 1, "1": 2}
    results = {"caches": {"mine": {"64": found}}}
    assert quality_page.depths(results, "").splitlines()[0] == "| cache | tokens | depth 0.25 | depth 1 |"
    assert quality_page.depths(results, "").splitlines()[2] == "| mine | 64 | 1 | 2 |"


def test_settings_of_the_page_name_the_rivals() -> None:
    settings = read("quality_lab.json")["settings"]
    assert settings["absent"] == []
    assert settings["tokens"] == 18 * settings["context"]
