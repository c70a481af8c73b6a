"""Fill the tables of `docs/quality.md` from the JSON files in `results/`.

A table of the page stands between `<!-- FILE TABLE -->` and `<!-- end -->`; TABLE is a sweep of FILE, or one of
`agreement`, `needles`, `depths` and `targets`; `choices` is the end of what the doctor printed. `--check` writes
nothing and fails where the page and the files differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import page_blocks
from page_blocks import RESULTS, ROOT, Row, read, verdict
from quality import COLUMNS
from quality_sweeps import WINDOWS_WITHIN_2_PERCENT
from report import table
from retrieval import columns, shares

PAGE = ROOT / "docs" / "quality.md"
NEEDLES = "quality_retrieval_lab.json"
CONTEXT = "4096"
SHORT = ("method", "bits", "KL", "standard error", "loss %")
ONE_SIDED = ("scale_rules", "shaping", "centring", "signs")
"""Sweeps whose rows differ in nothing that true bits would show."""

NO_WINDOWS = {4: 0.016, 3: 0.060, 2: 0.23}
WINDOWS = {4: 0.012, 3: 0.045, 2: 0.16}
MOST_FOR_WINDOWS = 2.0
"""Per cent of the bytes at 4096 tokens that windows may add."""
TRELLIS = {3: 0.042, 2: 0.17}
RIVALS = {4: 0.8, 3: 0.75, 2: 0.6}
RETRIEVED = {4: 1.0, 3: 1.0, 2: 0.95}


def sweep(results: Row, name: str) -> str:
    """The table of a sweep; full precision, which is a row of zeros, only beside rivals."""
    rows = results["sweeps"][name]
    columns = COLUMNS if name == "methods" else tuple(c for c in SHORT if c != "bits" or name not in ONE_SIDED)
    kept = rows if name == "methods" else rows[1:]
    return table(columns, [[row[column] for column in columns] for row in kept])


def agreement(results: Row, _: str) -> str:
    """The packed cache beside one pass."""
    rows = results["agreement"]
    return table(list(rows[0]), [list(row.values()) for row in rows])


def needles(results: Row, _: str) -> str:
    """Right answers by cache and length."""
    return table(columns(results["caches"]), shares(results["caches"]))


def depths(results: Row, _: str) -> str:
    """Right answers by cache and depth of the needle."""
    rows = [
        [name, length, *found["right_by_depth"].values()]
        for name, lengths in results["caches"].items()
        for length, found in lengths.items()
    ]
    first = next(iter(next(iter(results["caches"].values())).values()))
    return table(["cache", "tokens", *(f"depth {depth}" for depth in first["right_by_depth"])], rows)


def at_bits(points: list[tuple[float, float]], bits: float) -> float | None:
    """KL of a rival at ``bits``, log-linear between its widths; None below the fewest, the last one above the most."""
    points = sorted(points)
    if bits < points[0][0]:
        return None
    for (low, first), (high, second) in pairwise(points):
        if bits <= high:
            share = (bits - low) / (high - low)
            return math.exp((1 - share) * math.log(first) + share * math.log(second))
    return points[-1][1]


def best_rival(rows: list[Row], bits: float, *, windows: bool = False) -> float:
    """The least KL that another project's codec has at ``bits``, with full-precision windows or without."""
    families: dict[str, list[tuple[float, float]]] = {}
    for row in rows[1:]:
        name, has_windows, _ = row["method"].partition(", windows ")
        if bool(has_windows) == windows and not name.startswith("turboquant"):
            families.setdefault(name.rsplit(",", 1)[0], []).append((row["bits"], row["KL"]))
    found = [kl for kl in (at_bits(points, bits) for points in families.values()) if kl is not None]
    return min(found)


def too_wide(row: Row, alone: float) -> str | None:
    """What the cell says where windows add more bytes to packed tokens ``alone`` than the target allows."""
    more = 100 * (row["bits"] / alone - 1)
    said = f"{row['KL']:.4g} (does not count: {more:.1f} % more bytes, {MOST_FOR_WINDOWS:g} % allowed)"
    return said if more > MOST_FOR_WINDOWS else None


def targets(results: Row, _: str) -> str:
    """Every target beside what was measured."""
    rows = results["sweeps"]["methods"]
    named = {row["method"]: row for row in rows}
    found: list[list[str]] = []
    for name, limits in (("KL", NO_WINDOWS), ("KL with windows", WINDOWS)):
        for bits, limit in limits.items():
            methods = contestants(bits, named, with_windows=limits is WINDOWS)
            alone = named[f"turboquant, {bits} bit"]["bits"] if limits is WINDOWS else math.inf
            cells = (too_wide(row, alone) or verdict(row["KL"], limit) for row in methods)
            found.append([f"{name}, {bits} bit", f"<= {limit}", *cells])
    for bits, limit in TRELLIS.items():
        value = verdict(named[f"turboquant, trellis codes, {bits} bit"]["KL"], limit)
        found.append([f"KL of trellis codes, {bits} bit", f"<= {limit}", value, "", ""])
    for bits, limit in RIVALS.items():
        ratios = [row["KL"] / best_rival(rows, row["bits"]) for row in contestants(bits, named, with_windows=False)]
        name = f"KL over the best rival's at the same true bits, {bits} bit"
        found.append([name, f"<= {limit}", *(verdict(ratio, limit) for ratio in ratios)])
    for bits in RIVALS:
        plain, shaped = (
            f"{row['KL'] / best_rival(rows, row['bits'], windows=True):.4g}" for row in windowed(bits, named)
        )
        found.append([f"no target: the same, the rival with such windows too, {bits} bit", "", plain, "", shaped])
    return table(("target", "", "packed alone", "defaults of turboquant-hf", "shaped codes"), found + retrieved())


def windowed(bits: int, named: dict[str, Row]) -> list[Row]:
    """Plain and shaped codes with the windows of their width."""
    size = "{} + {}".format(*WINDOWS_WITHIN_2_PERCENT[bits])
    return [named[f"{family}, {bits} bit, windows {size}"] for family in ("turboquant", "turboquant, shaped codes")]


def contestants(bits: int, named: dict[str, Row], *, with_windows: bool) -> list[Row]:
    """Plain codes, the defaults of turboquant-hf and shaped codes."""
    plain, shaped = (
        windowed(bits, named)
        if with_windows
        else (named[f"turboquant, {bits} bit"], named[f"turboquant, shaped codes, {bits} bit"])
    )
    return [plain, named[f"turboquant-hf, defaults, {bits} bit"], shaped]


def retrieved() -> list[list[str]]:
    """Needle targets: right answers over those of full precision."""
    caches = read(NEEDLES)["caches"]
    full, found = caches["full precision"][CONTEXT]["right"], []
    for bits, limit in RETRIEVED.items():
        share = caches[f"{bits} bit"][CONTEXT]["right"] / full
        name = f"needles of {CONTEXT} tokens over full precision's, {bits} bit"
        found.append([name, f">= {limit:g}", "", verdict(share, limit, least=True), ""])
    return found


def choices(name: str) -> str:
    """What the doctor printed below its table of heads."""
    text = (RESULTS / name).read_text(encoding="utf-8")
    return f"```\n{text[text.index('nats per token at') :].rstrip()}\n```"


TABLES: dict[str, Callable[[Row, str], str]] = {
    "agreement": agreement,
    "needles": needles,
    "depths": depths,
    "targets": targets,
}


def made(name: str, kind: str) -> str:
    """The table of a mark."""
    return choices(name) if kind == "choices" else TABLES.get(kind, sweep)(read(name), kind)


def filled(page: str) -> str:
    """The page with every table made anew."""
    return page_blocks.filled(page, made)


if __name__ == "__main__":
    page_blocks.main(__doc__, [PAGE], filled, "python benchmarks/quality_page.py")
