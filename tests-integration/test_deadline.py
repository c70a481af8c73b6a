"""Children of the serving benchmarks end in time, with the processes that they started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.usefixtures("benchmarks"),
    pytest.mark.skipif(sys.platform == "win32", reason="process groups are killed, which Windows does not have"),
]
BENCHMARKS = str(Path(__file__).parents[1] / "benchmarks")
PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(float(sys.argv[1]))
"""
INTERRUPTED = f"""
import subprocess, sys
from deadline import interruptible, started
interruptible()
with started([sys.executable, "-c", {PARENT!r}, "600"], 600, stdout=subprocess.PIPE) as (process, _):
    print(process.stdout.readline().strip(), flush=True)
    process.wait()
"""


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)


def gone(pid: int) -> bool:
    """Whether a process ends within seconds; one that nobody has waited for counts as ended."""
    for _ in range(100):
        try:
            status = Path(f"/proc/{pid}/stat").read_text() if sys.platform == "linux" else ""
            os.kill(pid, 0)
        except (ProcessLookupError, FileNotFoundError):
            return True
        if status.rpartition(")")[2].split()[:1] == ["Z"]:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize(("sleep", "seconds"), [("600", 3.0), ("0", 600.0)], ids=["late", "in time"])
def test_a_child_ends_with_its_own_children(sleep: str, seconds: float) -> None:
    from deadline import started

    with started([sys.executable, "-c", PARENT, sleep], seconds, stdout=subprocess.PIPE) as (process, late):
        assert process.stdout is not None
        grandchild = int(process.stdout.readline())
        process.wait()
    assert late.is_set() == (sleep == "600")
    assert gone(grandchild)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_what_was_started(number: signal.Signals) -> None:
    """Also where SIGINT was ignored when the process began, as in the background of a script."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([BENCHMARKS, os.environ.get("PYTHONPATH", "")])}
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process = subprocess.Popen([sys.executable, "-c", INTERRUPTED], stdout=subprocess.PIPE, env=environment)
    finally:
        signal.signal(signal.SIGINT, previous)
    assert process.stdout is not None
    grandchild = int(process.stdout.readline())
    process.send_signal(number)
    process.wait(60)
    process.stdout.close()
    assert gone(grandchild)


def test_contenders_are_not_started_when_time_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import serving

    out = tmp_path / "serving.json"
    monkeypatch.setattr(sys, "argv", ["serving.py", "--quick", "--minutes", "0.1", "--out", str(out)])
    with pytest.raises(SystemExit) as ended:
        serving.main()
    assert ended.value.code == 1
    assert "turboquant-4bit: not started, 0.1 minutes are over" in capsys.readouterr().out
    assert not out.exists()
