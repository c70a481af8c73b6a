"""What documents say of GPUs is what benchmarks/results holds, and targets are met or missed as they say."""

from __future__ import annotations

import json
import re
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import gpu_pages  # noqa: E402
import kernel_targets  # noqa: E402
import page_blocks  # noqa: E402
import report  # noqa: E402
import serving_targets  # noqa: E402
from gpu_pages import PAGE_128, PAGES, filled, made  # noqa: E402
from page_blocks import BLOCK, RESULTS, load, update  # noqa: E402

TEXTS = {path.name: path.read_text(encoding="utf-8") for path in PAGES}
MARKS = {(block["file"], block["kind"]) for text in TEXTS.values() for block in BLOCK.finditer(text)}
FILES = sorted(path.name for path in RESULTS.glob("*_h[12]00*.json"))


@pytest.mark.parametrize("page", TEXTS)
def test_a_page_shows_what_was_measured(page: str) -> None:
    assert BLOCK.search(TEXTS[page])
    assert filled(TEXTS[page]) == TEXTS[page], f"run {gpu_pages.COMMAND}"


@pytest.mark.parametrize("header", ["FA3 bf16", "ms a token", "tokens/s", "ours, 4 bit", "scale_rule"])
def test_no_table_of_figures_is_typed_in(header: str) -> None:
    shown = [page for page, text in TEXTS.items() if header in text]
    assert shown
    assert not [page for page in shown if header in BLOCK.sub("", TEXTS[page])]


@pytest.mark.parametrize("name", FILES)
def test_a_result_is_shown_and_names_a_clean_commit(name: str) -> None:
    assert any(fnmatch(name, pattern) for pattern, _ in MARKS)
    assert any(fnmatch(name, pattern) for pattern, kind in MARKS if kind == "run")
    found = load(name)
    assert re.fullmatch(r"[0-9a-f]{7,40}", found["commit"])
    assert re.search(r"_(h[12]00)", name)[1].upper() in found["device"]


@pytest.mark.parametrize("name", FILES)
def test_a_command_names_no_folder_of_a_machine(name: str) -> None:
    assert not re.search(r"(^|[\s=])/", load(name)["command"])


def test_the_command_of_a_run_names_no_folder_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/benchmarks/kernels.py", "--json", "/somewhere/a.json", "results/b"])
    assert report.facts("cpu")["command"] == "python benchmarks/kernels.py --json a.json results/b"


def test_decode_speeds_are_of_steps_that_compile_nothing() -> None:
    rows = [row for name in FILES if name.startswith("transformers_") for row in load(name)["results"]["rows"]]
    assert rows
    assert all("median_step_seconds" in row for row in rows if "tokens_per_second" in row)


@pytest.mark.parametrize(("pattern", "kind"), [("kernels_of_nobody.json", "run"), ("kernels_h100.json", "nothing")])
def test_a_mark_without_a_file_or_a_kind_is_refused(pattern: str, kind: str) -> None:
    with pytest.raises(SystemExit, match=f"{pattern} {kind}"):
        made(pattern, kind)


def test_check_refuses_a_page_that_differs_and_writes_nothing(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- kernels_h100.json run -->\n\nold\n\n<!-- end -->\n")
    with pytest.raises(SystemExit, match=r"page\.md differs from results/: run a command"):
        update([page], filled, check=True, command="a command")
    assert "old" in page.read_text()
    update([page], filled, check=False, command="a command")
    assert "NVIDIA H100" in page.read_text()
    update([page], filled, check=True, command="a command")


def rows_of_attention(speed: float) -> list[dict[str, Any]]:
    """Every shape with a target, ``speed`` times as fast as FlashAttention-3, at half the limit."""
    shapes = [f"{name}, group 4, head_dim 128" for name in kernel_targets.LEAST_SPEED]
    shapes += [f"8 x 32K, group 4, head_dim {head_dim}" for head_dim in (64, 256)]
    figures = {f"packed_{bits}": 100.0 for bits in (4, 3, 2)} | {f"limit_{bits}": 50.0 for bits in (4, 3, 2)}
    return [{"shape": shape, "fa3": 100 * speed, **figures} for shape in shapes]


def test_targets_of_attention_are_relative_to_flash_attention() -> None:
    found = {row[0].split(":")[0]: row[1:] for row in kernel_targets.against_flash_attention(rows_of_attention(3.3))}
    assert found["32 x 32K"] == ["3.3 (met), >= 3.3", "3.3 (missed), >= 3.8", "3.3 (missed), >= 5"]
    assert found["1 x 4K"] == ["3.3 (met), >= 1", "no target", "no target"]


def test_other_head_dims_are_held_to_the_share_of_the_limit() -> None:
    rows = rows_of_attention(3.0)
    rows[-1]["packed_3"] = 120.0
    found = kernel_targets.other_head_dims(rows)
    assert [row[2] for row in found] == ["1 (met), >= 0.85", "0.8333 (missed), >= 0.85"]


def test_storing_is_held_to_what_caches_store() -> None:
    rows = [
        {"tokens": tokens, "head_dim": 64, "bits": bits, "scale_rule": rule, "limit": 4.0, "store": time}
        for tokens in (32, 1024)
        for bits in (4, 3, 2)
        for rule, time in (("searched", 8.0), ("unbiased", 1.0))
    ]
    append, prompt = kernel_targets.storing(rows)
    assert append[1:] == ["8 (met), <= 8"] * 3
    assert prompt[1:] == ["0.5 (met), >= 0.5"] * 3


def test_what_a_cut_run_lacks_is_not_measured() -> None:
    rows = rows_of_attention(3.3)[:1]
    first, second = kernel_targets.against_flash_attention(rows)[:2]
    assert first[1] == "3.3 (met), >= 3.3"
    assert second[1] == "not measured, >= 2.8"
    assert kernel_targets.other_head_dims(rows)[0][1:] == ["not measured, >= 0.85"] * 3
    stored = {"tokens": 32, "head_dim": 64, "bits": 4, "scale_rule": "searched", "limit": 1.0, "store": 9.0}
    assert kernel_targets.storing([stored])[0][1:] == ["9 (missed), <= 8", *["not measured, <= 8"] * 2]


def test_rivals_that_were_not_timed_decide_nothing() -> None:
    rows = rows_of_attention(3.0)
    assert kernel_targets.against_rivals(rows) == []
    rows[0] |= {"turboquant_4bit_nc": 1000.0, "turboquant_3bit_nc": 990.0}
    (found,) = kernel_targets.against_rivals(rows)
    assert found[1:] == ["10 (met), >= 10", "9.9 (missed), >= 10", "no target"]


def test_tables_of_a_cut_run_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = load("kernels_h100.json")
    cut = {PAGE_128: whole["results"][PAGE_128][:2], "store": [], "vectors": []}
    (tmp_path / "kernels_h100.json").write_text(json.dumps({**whole, "results": cut}))
    monkeypatch.setattr(page_blocks, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu_pages, "RESULTS", tmp_path)
    assert made("kernels_h100.json", "store") == made("kernels_h100.json", "vectors") == gpu_pages.NOTHING
    assert "not measured, >= 3.3" in made("kernels_h100.json", "kernel_targets")
    assert made("kernels_h100.json", PAGE_128).count("\n") == 3
    assert made("kernels_h100.json", "headline").count("\n") == 1


def engine(blocks: int, **workloads: tuple[float, float]) -> dict[str, Any]:
    """A result of serving; ``workloads`` by name, prefill in seconds and milliseconds of a token."""
    figures = {name: {"prefill_s": prefill, "token_ms": token} for name, (prefill, token) in workloads.items()}
    return {"commit": "abc1234", "blocks": blocks, "block_size": 16, "workloads": figures}


def test_targets_of_serving_are_relative_to_bf16() -> None:
    results = {"bf16": engine(100, a=(0.95, 10.0)), "turboquant-4bit": engine(375, a=(1.0, 10.2))}
    header, rows = serving_targets.targets(results)
    found = {row[0]: row[2:] for row in rows}
    assert header == ["target", "", "turboquant-4bit"]
    assert found["tokens that fit, over bf16's"] == ["3.75 (met), >= 3.75"]
    assert found["a: time per token over bf16's"] == ["1.02 (met)"]
    assert found["a: prefill speed over bf16's"] == ["0.95 (met)"]
    assert found["16 x 32K: speed over bf16's"] == ["not measured"]


def test_a_workload_that_bf16_has_no_room_for_is_not_measured_and_says_why() -> None:
    results = {"bf16": engine(100, a=(1.0, 10.0)), "turboquant-4bit": engine(375, **{"16 x 32K": (9.0, 13.6)})}
    results["bf16"]["workloads"]["16 x 32K"] = {"skipped": "no room"}
    found = {row[0]: row[2:] for row in serving_targets.targets(results)[1]}
    assert found["16 x 32K: time per token over bf16's"] == ["not measured"]
    assert found["16 x 32K: milliseconds of a token (set for an H200)"] == ["13.6 (missed)"]
    shown = gpu_pages.serving([{"commit": "abc1234", "results": results}])
    assert shown.endswith("\n\n- bf16, 16 x 32K: no room")


def test_an_engine_that_failed_or_is_of_another_commit_is_named() -> None:
    failed = {**engine(375, a=(1.0, 9.0)), "error": "ended after 9 s\nThe log ends with\nsecret", "commit": "def5678"}
    results = {"bf16": engine(100, a=(1.0, 10.0)), "turboquant-4bit": failed}
    shown = gpu_pages.serving([{"commit": "abc1234", "results": results}])
    assert "- turboquant-4bit: commit def5678\n- turboquant-4bit: ended after 9 s" in shown
    assert "secret" not in shown


def test_serving_without_bf16_decides_nothing() -> None:
    with pytest.raises(SystemExit, match="relative to bf16, which is not among turboquant-4bit"):
        serving_targets.targets({"turboquant-4bit": engine(375), "fp8": {"error": "no"}})


def test_rows_of_two_runs_are_relative_to_their_own_and_an_absent_case_is_named() -> None:
    def result(command: str, stock: float) -> dict[str, Any]:
        case = {"batch": 1, "context": 4096}
        rows = [
            {**case, "cache": "DynamicCache bf16", "tokens_per_second": stock, "median_step_seconds": 1 / stock},
            {**case, "cache": "turboquant 4 bit", "tokens_per_second": 20.0, "median_step_seconds": 0.05},
            {**case, "context": 9, "cache": "turboquant 4 bit", "reason": "no room"},
            {**case, "cache": "QuantizedCache fp8", "reason": "unknown"},
        ]
        return {"command": command, "results": {"rows": rows}}

    runs = [result("first", 10.0), result("second", 40.0)]
    shown = gpu_pages.KINDS["decode"](runs)
    first, second = shown.split("`second`:")
    assert first.startswith("`first`:")
    assert "| 2.00x |" in first
    assert "| 0.50x |" in second
    assert gpu_pages.absent(runs) == "- turboquant 4 bit, 1 x 9: no room\n- QuantizedCache fp8: unknown"


def test_a_soak_is_shown_by_its_counts() -> None:
    shown = gpu_pages.soak([{"results": {"soak": {"passed": True, "sent": 7, "errors": []}}}])
    assert "| passed | yes |" in shown
    assert "| sent | 7 |" in shown
    assert "errors" not in shown
