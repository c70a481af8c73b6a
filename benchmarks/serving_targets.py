"""What serving over packed pages should reach beside vLLM's bf16 cache, met or missed by a run."""

from __future__ import annotations

from page_blocks import NOT_MEASURED, Row, verdict

STOCK = "bf16"
LEAST_CAPACITY = {"turboquant-4bit": 3.75, "turboquant-3bit": 5.0, "turboquant-2bit": 7.3}
"""Tokens that fit, relative to bf16."""
MOST_TOKEN_TIME = 1.02
"""Time per output token relative to bf16, in every workload."""
LEAST_PREFILL = 0.95
"""Speed of prefill relative to bf16."""
LARGEST = "16 x 32K"
MOST_LARGEST_MS = 13.5
LEAST_LARGEST_SPEED = 1.8
"""Where the cache is most of what is read: milliseconds of a token, and speed relative to bf16."""


def capacity(result: Row) -> int:
    """Tokens that fit into the cache."""
    return int(result["blocks"] * result["block_size"])


def timed(result: Row, workload: str) -> Row | None:
    """Figures of a workload; None where it was skipped or not reached."""
    found: Row | None = result["workloads"].get(workload)
    return found if found is not None and "token_ms" in found else None


def over_stock(result: Row, stock: Row, workload: str, figure: str) -> float | None:
    """A figure relative to bf16's."""
    ours, theirs = timed(result, workload), timed(stock, workload)
    return ours[figure] / theirs[figure] if ours and theirs else None


def most(value: float | None, limit: float) -> str:
    """A cell of a target that is an upper limit."""
    return NOT_MEASURED if value is None else verdict(value, limit)


def least(value: float | None, limit: float) -> str:
    """A cell of a target that is a lower limit, of a speed whose inverse is ``value``."""
    return NOT_MEASURED if value is None else verdict(1 / value, limit, least=True)


def targets(results: dict[str, Row]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: each target beside what the packed caches of ``results`` reach.

    Raises:
        SystemExit: the run has no bf16 cache, which targets are relative to.
    """
    results = {name: result for name, result in results.items() if "blocks" in result}
    if STOCK not in results:
        raise SystemExit(f"targets are relative to {STOCK}, which is not among {', '.join(results) or 'no results'}")
    stock = results[STOCK]
    caches = [name for name in LEAST_CAPACITY if name in results]
    cells = [
        f"{verdict(capacity(results[name]) / capacity(stock), LEAST_CAPACITY[name], least=True)}, "
        f">= {LEAST_CAPACITY[name]:g}"
        for name in caches
    ]
    rows = [["tokens that fit, over bf16's", "", *cells]]
    workloads = list(dict.fromkeys(workload for result in results.values() for workload in result["workloads"]))
    for title, figure, cell, limit, sign in (
        ("time per token over bf16's", "token_ms", most, MOST_TOKEN_TIME, "<="),
        ("prefill speed over bf16's", "prefill_s", least, LEAST_PREFILL, ">="),
    ):
        for workload in workloads:
            ratios = [over_stock(results[name], stock, workload, figure) for name in caches]
            rows.append([f"{workload}: {title}", f"{sign} {limit:g}", *(cell(ratio, limit) for ratio in ratios)])
    return ["target", "", *caches], [*rows, *largest(results, stock, caches)]


def largest(results: dict[str, Row], stock: Row, caches: list[str]) -> list[list[str]]:
    """Rows of the workload that the cache dominates."""
    runs = [timed(results[name], LARGEST) for name in caches]
    times = [most(run and run["token_ms"], MOST_LARGEST_MS) for run in runs]
    ratios = [over_stock(results[name], stock, LARGEST, "token_ms") for name in caches]
    speeds = [least(ratio, LEAST_LARGEST_SPEED) for ratio in ratios]
    return [
        [f"{LARGEST}: milliseconds of a token (set for an H200)", f"<= {MOST_LARGEST_MS:g}", *times],
        [f"{LARGEST}: speed over bf16's", f">= {LEAST_LARGEST_SPEED:g}", *speeds],
    ]
