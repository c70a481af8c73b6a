"""Fill what documents say of GPUs from the JSON files in `results/`: README.md and docs/{kernels,vllm,hf}.md.

A part stands between `<!-- FILE KIND -->` and `<!-- end -->`; FILE may be a pattern, KIND is one of the names below.
A newer file replaces the older one under its name, and this script the tables:

    cp NEW/serving.json benchmarks/results/serving_h100.json
    python benchmarks/gpu_pages.py

`--check` writes nothing and fails where a page and the files differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import page_blocks
from kernel_targets import against_flash_attention, against_rivals, encoding, other_head_dims, storing
from kernels import attention_table, rows_table
from page_blocks import RESULTS, ROOT, Row, load
from report import table
from serving import summary
from serving_targets import targets as serving_targets
from transformers_decode import decode_table

COMMAND = "python benchmarks/gpu_pages.py"
PAGES = (ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in ("kernels", "vllm", "hf")))
NAMED_VERSIONS = ("torch", "triton", "transformers", "vllm", "fused-turboquant")
HEADLINE_SHAPE = "32 x 32K, group 4, head_dim 128"
HEADLINE = {
    "fa3": "FlashAttention-3, bf16",
    "turboquant_4bit_nc": "vLLM's TurboQuant, 4 bit",
    "packed_4": "ours, 4 bit",
    "packed_3": "ours, 3 bit",
    "packed_2": "ours, 2 bit",
}
WIDTHS = ["4 bit", "3 bit", "2 bit"]
PAGE_128 = "attention_page_128"
NOTHING = "The run was cut before this."


def run(reports: list[Row]) -> str:
    """Where, when and by what command each file was measured, and its note."""
    lines = (f"- {facts(report)}: `{report['command']}`. {report.get('note', '')}" for report in reports)
    return "\n".join(line.rstrip() for line in lines)


def facts(report: Row) -> str:
    """Device, commit, date, versions, and bandwidth where it was measured."""
    versions = [f"{name} {report['versions'][name]}" for name in NAMED_VERSIONS if report["versions"].get(name)]
    bandwidth = report["results"].get("bandwidth")
    measured = [f"read bandwidth {bandwidth / 1e12:.2f} TB/s"] if bandwidth else []
    return ", ".join([report["device"], f"commit {report['commit']}", report["date"], *versions, *measured])


def only(reports: list[Row]) -> Row:
    """Results of the one file that a mark names."""
    (report,) = reports
    results: Row = report["results"]
    return results


def headline(reports: list[Row]) -> str:
    """Microseconds of one decode step, a row for each run that came to it, the newest first."""
    rows = []
    for report in sorted(reports, key=lambda report: str(report["date"]), reverse=True):
        for row in (row for row in report["results"][PAGE_128] if row["shape"] == HEADLINE_SHAPE):
            cells = (f"{row[name]:.0f}" if name in row else "-" for name in HEADLINE)
            rows.append([report["device"], report["commit"], *cells])
    return table(["device", "commit", *HEADLINE.values()], rows)


def attention(kind: str) -> Callable[[list[Row]], str]:
    """Times beside 16-bit attention and rivals; a cut run may have none."""
    return lambda reports: attention_table(rows) if (rows := only(reports).get(kind)) else NOTHING


def operations(kind: str) -> Callable[[list[Row]], str]:
    """Times of storing, encoding and decoding; a cut run may have none."""
    return lambda reports: rows_table(rows) if (rows := only(reports).get(kind)) else NOTHING


def kernel_targets(reports: list[Row]) -> str:
    """Targets of attention, storing and encoding, met or missed."""
    results = only(reports)
    rows = against_flash_attention(results[PAGE_128]) + other_head_dims(results[PAGE_128])
    rows += storing(results["store"]) + encoding(results["vectors"]) + against_rivals(results[PAGE_128])
    return table(["target", *WIDTHS], rows)


def sweeps(reports: list[Row]) -> str:
    """The configuration in use then and the fastest one, of every class that was swept."""
    rows = []
    for report in reports:
        for name, tried in report["results"].items():
            times: dict[str, Any] = {row["config"]: row["result"] for row in tried}
            timed = {config: time for config, time in times.items() if isinstance(time, float)}
            best = min(timed, key=lambda config: timed[config])
            rows.append([name, report["commit"], len(tried), timed["default"], timed[best], f"`{best}`"])
    return table(["class", "commit", "tried", "in use then, µs", "fastest, µs", "fastest"], rows)


def serving(reports: list[Row]) -> str:
    """Blocks, prefill and time per token of every cache, and what is not in the table."""
    (report,) = reports
    results = {
        name: {key: value for key, value in result.items() if key != "error"}
        for name, result in report["results"].items()
    }
    remarks = "\n".join(f"- {remark}" for remark in serving_remarks(report))
    return summary(results) + (f"\n\n{remarks}" if remarks else "")


def serving_remarks(report: Row) -> Iterator[str]:
    """Engines of another commit or that failed, with the first line why, and workloads that were skipped."""
    for name, result in report["results"].items():
        if result.get("commit", report["commit"]) != report["commit"]:
            yield f"{name}: commit {result['commit']}"
        if "error" in result:
            yield f"{name}: {result['error'].splitlines()[0]}"
        if "compiled_while_serving" in result:
            kernels = ", ".join(result["compiled_while_serving"])
            yield f"{name}: times include the compilation of {kernels}"
        for workload, figures in result.get("workloads", {}).items():
            if "skipped" in figures:
                yield f"{name}, {workload}: {figures['skipped']}"


def serving_goals(reports: list[Row]) -> str:
    """Targets of serving, met or missed."""
    return table(*serving_targets(only(reports)))


def preflight(reports: list[Row]) -> str:
    """Whether the engines start and agree with one another."""
    rows = [[name, "passed" if row["passed"] else "failed", row["told"]] for name, row in only(reports).items()]
    return table(["engine", "", "texts"], rows)


def soak(reports: list[Row]) -> str:
    """What random traffic came to."""
    found: Row = only(reports)["soak"]
    shown = {key: value for key, value in found.items() if not isinstance(value, list)}
    return table(["", "found"], [[key.replace("_", " "), _cell(value)] for key, value in shown.items()])


def _cell(value: Any) -> Any:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else value


def by_run(make: Callable[[Row], str]) -> Callable[[list[Row]], str]:
    """A table of each run by itself, because speeds are relative to others of the same run."""
    return lambda reports: "\n\n".join(f"`{report['command']}`:\n\n{make(report['results'])}" for report in reports)


def decoding(results: Row) -> str:
    """Speed, memory and bytes of caches in Transformers, without those that were not there."""
    return decode_table([row for row in results["rows"] if "reason" not in row])


def decoding_goals(results: Row) -> str:
    """Targets of Transformers' decoding, met or missed."""
    header = ["target", "batch x context", "cache", "at least", "found", ""]
    return table(header, [[*list(row.values())[:-1], "met" if row["met"] else "missed"] for row in results["targets"]])


def absent(reports: list[Row]) -> str:
    """What was not run, and why; of a cache that ran elsewhere, in which case."""
    rows = [row for report in reports for row in report["results"]["rows"]]
    ran = {row["cache"] for row in rows if "reason" not in row}
    found = {
        f"{row['cache']}, {row['batch']} x {row['context']}" if row["cache"] in ran else row["cache"]: row["reason"]
        for row in rows
        if "reason" in row
    }
    return "\n".join(f"- {what}: {reason}" for what, reason in found.items()) or "Everything was run."


KINDS: dict[str, Callable[[list[Row]], str]] = {
    "run": run,
    "headline": headline,
    PAGE_128: attention(PAGE_128),
    "attention_page_16": attention("attention_page_16"),
    "store": operations("store"),
    "vectors": operations("vectors"),
    "kernel_targets": kernel_targets,
    "sweeps": sweeps,
    "serving": serving,
    "serving_targets": serving_goals,
    "preflight": preflight,
    "soak": soak,
    "decode": by_run(decoding),
    "decode_targets": by_run(decoding_goals),
    "absent": absent,
}


def made(pattern: str, kind: str) -> str:
    """The part of a mark.

    Raises:
        SystemExit: no file has that name, or no part.
    """
    names = sorted(path.name for path in RESULTS.glob(pattern))
    if not names or kind not in KINDS:
        raise SystemExit(f"<!-- {pattern} {kind} -->: no such file in results/, or no such kind ({', '.join(KINDS)})")
    return KINDS[kind]([load(name) for name in names])


def filled(page: str) -> str:
    """The page with every part made anew."""
    return page_blocks.filled(page, made)


if __name__ == "__main__":
    page_blocks.main(__doc__, PAGES, filled, COMMAND)
