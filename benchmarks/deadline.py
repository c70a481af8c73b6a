"""A child process that ends at a time set in advance, with all processes that it started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any


def heed_interrupts() -> None:
    """Let SIGINT end this process and its children, which a shell's job in the background ignores."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def interruptible() -> None:
    """Let SIGINT and SIGTERM end this process by an exception, so that blocks of :func:`started` end their children."""
    heed_interrupts()
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
            kill_group(process)

        timer = threading.Timer(seconds, end)
        timer.start()
        try:
            yield process, late
        finally:
            timer.cancel()
            # An engine's own processes outlive one that failed, and hold its memory.
            kill_group(process)


def kill_group(process: subprocess.Popen[Any]) -> None:
    """Kill a process that leads a group of its own, with all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
