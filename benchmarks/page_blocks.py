"""Parts of documents that are made from the JSON files in `results/`.

A part stands between `<!-- FILE KIND -->` and `<!-- end -->`. FILE may be a pattern; what KIND is decides the caller.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"(?P<head><!-- (?P<file>\S+) (?P<kind>\S+) -->\n\n)(?:(?!<!-- ).)*?\n?\n?<!-- end -->", re.DOTALL)
"""A part, empty ones too; never a piece of the page with another's marks in it."""
NOT_MEASURED = "not measured"

Row = dict[str, Any]


def load(name: str) -> Row:
    """A file of ``results/``: facts of the run and its results."""
    found: Row = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return found


def read(name: str) -> Row:
    """Results of a file."""
    found: Row = load(name)["results"]
    return found


def filled(page: str, made: Callable[[str, str], str]) -> str:
    """The page with every part made anew by ``made(file, kind)``."""

    def part(block: re.Match[str]) -> str:
        return block["head"] + made(block["file"], block["kind"]) + "\n\n<!-- end -->"

    return BLOCK.sub(part, page)


def verdict(value: float, limit: float, *, least: bool = False) -> str:
    """The value and whether it keeps to the limit."""
    return f"{value:.4g} ({'met' if (value >= limit if least else value <= limit) else 'missed'})"


def update(pages: Sequence[Path], fill: Callable[[str], str], *, check: bool, command: str) -> None:
    """Write the pages anew, or with ``check`` write nothing.

    Raises:
        SystemExit: with ``check``, a page and its files differ.
    """
    for path in pages:
        page = path.read_text(encoding="utf-8")
        new = fill(page)
        if check and new != page:
            raise SystemExit(f"{path.name} differs from results/: run {command}")
        if not check:
            path.write_text(new, encoding="utf-8")


def main(description: str | None, pages: Sequence[Path], fill: Callable[[str], str], command: str) -> None:
    """Command line of a script that fills ``pages``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a page and its files differ")
    update(pages, fill, check=parser.parse_args().check, command=command)
