"""A pytest plug-in, ``-p failures_at_once`` with this folder on PYTHONPATH: failures are written as they happen.

To the file that FAILURES names, so that a run that is cut keeps them; pytest itself prints them at its end.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Failures:
    """Appends to a file, test by test."""

    path: Path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Append name, stage and traceback of what failed."""
        if report.failed:
            with self.path.open("a", encoding="utf-8") as sink:
                sink.write(f"=== {report.nodeid} ({report.when})\n{report.longreprtext}\n")


def pytest_configure(config: pytest.Config) -> None:
    """Listen, unless this is a worker of pytest-xdist, whose parent hears of each failure too."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Failures(Path(os.environ["FAILURES"])))
