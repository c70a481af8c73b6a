"""A child process that ends at a time set in advance, with all processes that it started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeAlias

Running: TypeAlias = tuple[subprocess.Popen[str], threading.Event]


def interruptible() -> None:
    """Let SIGINT and SIGTERM end this process by an exception, so that blocks of :func:`started` end their children.

    A process that a script started in the background ignores SIGINT.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


@contextmanager
def started(
    command: list[str], seconds: float, **options: Any
) -> Iterator[tuple[subprocess.Popen[str], threading.Event]]:
    """Run ``command`` in a group of its own, which is killed ``seconds`` later and at the end of the block.

    Args:
        command: of the child.
        seconds: until it is killed.
        options: of :class:`subprocess.Popen`.

    Yields:
        The process, and an event that is set when its time was up.
    """
    late = threading.Event()
    with subprocess.Popen(command, text=True, start_new_session=True, **options) as process:

        def end() -> None:
            late.set()
            _kill(process)

        timer = threading.Timer(seconds, end)
        timer.start()
        try:
            yield process, late
        finally:
            timer.cancel()
            # An engine's own processes outlive one that failed, and hold its memory.
            _kill(process)


def _kill(process: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
