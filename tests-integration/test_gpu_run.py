"""The runner of what needs a GPU, with steps that need none; and what the preflight calls a tie."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SECONDS = 4
"""Enough for an interpreter to start on a busy machine."""
TOLD = """
import time
try:
    time.sleep(600)
except KeyboardInterrupt:
    print('last words', flush=True)
"""


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.fixture
def keep_interrupts() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def a_run(out: Path, seconds: float) -> Any:
    import gpu_run

    return gpu_run.Run(out, workers=3, fa3=Path("fa3.so"), end=time.monotonic() + seconds)


@pytest.mark.usefixtures("benchmarks")
@pytest.mark.parametrize(("gpus", "interrupts"), [(1, signal.default_int_handler), (2, signal.SIG_IGN)])
def test_a_failed_or_endless_step_stops_no_other(
    gpus: int, interrupts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep_interrupts: None
) -> None:
    """Also in a shell's background job, where interrupts are ignored."""
    import gpu_run

    signal.signal(signal.SIGINT, interrupts)

    show = "import os; print('gpu', os.environ['CUDA_VISIBLE_DEVICES'], '{out}', flush=True)"
    steps = {
        "good": gpu_run.Step(("-c", show), 60, timed=True),
        "bad": gpu_run.Step(("-c", f"{show}; raise SystemExit(3)"), 60, timed=False),
        "endless": gpu_run.Step(("-c", f"{show}; import time; time.sleep(600)"), SECONDS, timed=False),
        "told": gpu_run.Step(("-c", TOLD), SECONDS, timed=False),
    }
    monkeypatch.setattr(gpu_run, "STEPS", steps)
    outcomes = {outcome.name: outcome for outcome in gpu_run.run_all(list(steps), a_run(tmp_path, 60), gpus)}
    assert {name: outcome.code for name, outcome in outcomes.items()} == {
        "good": 0,
        "bad": 3,
        "endless": None,
        "told": None,
    }
    last = gpus - 1
    assert {name: (tmp_path / f"{name}.txt").read_text().split("Traceback")[0] for name in steps} == {
        "good": f"gpu 0 {tmp_path}\n",
        "bad": f"gpu {last} {tmp_path}\n",
        "endless": f"gpu {last} {tmp_path}\n",
        "told": "last words\n",
    }
    told = gpu_run.summary(list(outcomes.values()), tmp_path)
    assert "| bad | failed (3) |" in told
    assert "| endless | out of time |" in told


@pytest.mark.usefixtures("benchmarks")
def test_steps_after_the_end_are_not_begun(tmp_path: Path) -> None:
    import gpu_run

    (outcome,) = gpu_run.run_all(["kernels"], a_run(tmp_path, 0), 1)
    assert outcome == gpu_run.Outcome("kernels", None, 0.0)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("benchmarks")
def test_commands_have_what_the_run_gives(tmp_path: Path) -> None:

    run = a_run(tmp_path, 0)
    assert run.command("kernels")[-4:] == ["--json", str(tmp_path / "kernels.json"), "--fa3", "fa3.so"]
    quick = run.command("quick")
    assert quick[quick.index("-n") + 1] == "3"
    assert f"--junitxml={tmp_path}/quick.xml" in quick
    assert run.environment("quick", 1)["FAILURES"] == str(tmp_path / "quick.failures")


@pytest.mark.usefixtures("benchmarks")
def test_quality_is_measured_on_what_the_command_line_names(tmp_path: Path) -> None:
    import gpu_run

    prompts = tmp_path / "needle.json.gz"
    prompts.touch()
    words = ["--out", "here", "--model", str(tmp_path), "--text", __file__, "--prompts", str(prompts)]
    given = gpu_run.parse([*words, "--steps", "quality", "long-text", "needles"])
    run = gpu_run.Run(tmp_path, 3, None, 0.0, given.subject)
    assert run.command("quality")[1:4] == ["benchmarks/quality.py", str(tmp_path), __file__]
    assert run.command("long-text")[-2:] == ["--context", "4096"]
    assert run.command("needles")[1:4] == ["benchmarks/retrieval.py", str(tmp_path), str(prompts)]
    for name in given.steps:
        command = run.command(name)
        assert command[command.index("--json") + 1] == str(tmp_path / f"quality_{name}.json")


@pytest.mark.usefixtures("benchmarks")
def test_the_steps_of_quality_are_commands_of_its_scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_run
    import quality
    import retrieval

    run = gpu_run.Run(tmp_path, 3, None, 0.0, gpu_run.Subject(prompts=tmp_path / "p"))
    assert retrieval.parse(run.command("needles")[2:]).windows == [(4, 16), (4, 64)]
    for name, sweeps, context in (("quality", ["methods"], 1024), ("long-text", ["windows", "defaults"], 4096)):
        monkeypatch.setattr(sys, "argv", run.command(name)[1:])
        arguments = quality.parse()
        assert (arguments.sweep, arguments.context, arguments.device) == (sweeps, context, "cuda")


@pytest.mark.usefixtures("benchmarks")
def test_needles_need_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import gpu_run

    assert set(gpu_run.STEPS) - set(gpu_run.parse(["--out", "here"]).steps) == {"needles"}
    for given in ([], ["--prompts", str(tmp_path / "none.gz")]):
        with pytest.raises(SystemExit):
            gpu_run.parse(["--out", "here", "--steps", "needles", *given])
        assert "step needles needs --prompts" in capsys.readouterr().err


@pytest.mark.usefixtures("benchmarks")
def test_a_soak_has_the_time_of_its_traffic(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import gpu_run
    import serving_soak

    minutes = gpu_run.parse(["--out", "here", "--steps", "soak", "--soak", "6", "--minutes", "9"]).soak
    run = gpu_run.Run(tmp_path, 3, None, time.monotonic() + 3600, soak=minutes)
    command = run.command("soak")
    assert command[command.index("--soak") + 1] == "6.0"
    assert run.seconds("soak") > 6 * 60 + serving_soak.STARTING_SECONDS
    assert run.seconds("quick") == gpu_run.STEPS["quick"].seconds
    with pytest.raises(SystemExit):
        gpu_run.parse(["--out", "here", "--steps", "soak", "--minutes", "9"])
    assert "--soak 10 does not end within --minutes 9" in capsys.readouterr().err


@pytest.mark.usefixtures("benchmarks")
def test_a_cut_run_keeps_its_failures(tmp_path: Path) -> None:
    """The plug-in writes them as they happen, once, also where workers report them."""
    (tmp_path / "test_it.py").write_text("def test_bad():\n    assert 1 == 2\n\ndef test_good():\n    pass\n")
    run = a_run(tmp_path, 0)
    for workers in ([], ["-n", "2"]):
        failures = tmp_path / f"{len(workers)}.failures"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "failures_at_once", *workers]
        environment = {**run.environment("quick", 0), "FAILURES": str(failures)}
        result = subprocess.run(
            [*command, "test_it.py"], cwd=tmp_path, env=environment, capture_output=True, check=False
        )
        assert result.returncode == 1
        text = failures.read_text()
        assert text.count("===") == 1
        assert "assert 1 == 2" in text


@pytest.mark.usefixtures("benchmarks")
def test_every_step_names_a_file_that_is_there() -> None:
    import gpu_run

    for step in gpu_run.STEPS.values():
        paths = [argument for argument in step.arguments if argument.startswith(("benchmarks/", "packages/"))]
        assert paths
        assert all((ROOT / path).exists() for path in paths)


@pytest.mark.usefixtures("benchmarks")
def test_texts_part_by_the_lead_of_the_expected_token() -> None:
    import serving_preflight

    def text(*tokens: int) -> dict[str, Any]:
        return {"tokens": list(tokens), "logprobs": [{"7": -0.5, "8": -0.625, "9": -2.0}] * len(tokens)}

    expected = [text(7, 7), text(7, 7), text(7, 7)]
    assert serving_preflight.leads(expected, [text(7, 7), text(7, 8), text(9, 7)]) == [0.125, 1.5]
    assert serving_preflight.leads([text(7)], [text(3)]) == [float("inf")]
    assert sys.modules["serving_preflight"].TIE == 0.25


@pytest.mark.usefixtures("benchmarks")
def test_an_engine_whose_answers_change_after_sleep_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import serving_preflight

    def text(token: int) -> dict[str, Any]:
        return {"tokens": [token], "logprobs": [{"7": -0.5, "8": -0.625, "9": -2.0}]}

    rounds = {"eager": [[text(7)], [text(7)]], "graphs": [[text(8)], [text(8)]], "sleep": [[text(7)], [text(9)]]}

    def ask(name: str, *_: object) -> list[Any]:
        if name not in rounds:
            raise serving_preflight.NotHereError("no such thing here")
        return rounds[name]

    monkeypatch.setattr(serving_preflight, "ask", ask)
    assert serving_preflight.check_all(["eager", "graphs", "chunked"], tmp_path, tmp_path, 1.0)
    assert not serving_preflight.check_all(["eager", "sleep", "chunked"], tmp_path, tmp_path, 1.0)
    results = json.loads((tmp_path / "preflight.json").read_text())["results"]
    assert {name: result["passed"] for name, result in results.items()} == {
        "eager": True,
        "sleep": False,
        "chunked": None,
    }
    assert "before sleep" in results["sleep"]["told"]
