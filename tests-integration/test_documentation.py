"""Every Python block of the documentation runs, page by page, top to bottom."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("packages/*/README.md")])


def program(page: Path) -> str:
    """The blocks of a page as one program, on the lines where they stand in the page."""
    text = page.read_text()
    lines = [""] * (text.count("\n") + 1)
    for block in BLOCK.finditer(text):
        first = text.count("\n", 0, block.start(1))
        for offset, line in enumerate(block.group(1).splitlines()):
            lines[first + offset] = line
    return "\n".join(lines)


PROGRAMS = {str(page.relative_to(ROOT)): program(page) for page in PAGES}


@pytest.mark.parametrize("page", [page for page, text in PROGRAMS.items() if text.strip()])
def test_the_blocks_of_a_page_run(page: str, tmp_path: Path) -> None:
    script = tmp_path / f"{page.replace('/', '_')}.py"
    script.write_text(PROGRAMS[page])
    run(str(script))


def run(*arguments: str) -> str:
    """Output of Python with ``arguments``, at the root of the checkout."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    return done.stdout


def test_the_conformance_suite_of_the_page_passes(tmp_path: Path) -> None:
    """The class that docs/providers.md shows is a suite of tests, which a run of the page only defines."""
    suite = tmp_path / "test_my_provider.py"
    suite.write_text(PROGRAMS["docs/providers.md"])
    shown = run("-m", "pytest", "-q", "-c", os.devnull, "--rootdir", str(tmp_path), str(suite))
    passed = re.search(r"(\d+) passed", shown)
    assert passed is not None, shown
    assert int(passed[1]) > 100
    assert "failed" not in shown


def test_the_first_pages_have_an_example() -> None:
    for page in ("README.md", "docs/index.md", "docs/concepts.md", "docs/providers.md"):
        assert PROGRAMS[page].strip(), f"{page} shows no code"
