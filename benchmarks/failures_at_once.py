"""A pytest plug-in, ``-p failures_at_once`` with this folder on PYTHONPATH: failures are written as they happen.

To the file that FAILURES names, so that a run that is cut keeps them; pytest itself prints them at its end.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Append name, stage and traceback of what failed; workers of pytest-xdist leave it to their parent."""
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        with Path(os.environ["FAILURES"]).open("a", encoding="utf-8") as sink:
            sink.write(f"=== {report.nodeid} ({report.when})\n{report.longreprtext}\n")
