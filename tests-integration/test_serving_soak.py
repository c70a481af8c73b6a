"""A soak passes only if everything happened that it is for, and names what went wrong."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import serving  # noqa: E402
import serving_soak  # noqa: E402
from serving_traffic import PROBE_TOKENS, PROBES, Traffic  # noqa: E402
from serving_verdict import failures  # noqa: E402

GOOD: dict[str, Any] = {
    "over": True,
    "sent": 12,
    "done": 10,
    "cancelled": 2,
    "probes": 3,
    "preemptions": 4,
    "lost": 0,
    "all_blocks_free": True,
    "changed": [],
    "not_finite": [],
    "errors": [],
}


def test_a_soak_in_which_all_happened_passes() -> None:
    assert failures(GOOD) == []
    assert not serving.failed({"soak": {"passed": True, "failures": []}})


@pytest.mark.parametrize(
    ("found", "named"),
    [
        ({"done": 0}, "no request was answered"),
        ({"cancelled": 0}, "no request was cancelled"),
        ({"probes": 0}, "no probe was answered"),
        ({"preemptions": 0}, "no request was preempted"),
        ({"preemptions": None}, "no counter of preemptions"),
        ({"lost": 2}, "2 requests were neither answered nor cancelled"),
        ({"all_blocks_free": False}, "blocks are still in use"),
        ({"over": False, "all_blocks_free": None}, "the traffic did not come to its end"),
        ({"errors": ["noise-3 ended by 'error'"]}, "errors (1): noise-3 ended by 'error'"),
        ({"not_finite": ["noise-3", "probe-1-4"]}, "answers with a logprob that is not finite (2): noise-3; probe-1-4"),
        ({"changed": ["probe-0-5: token 3"]}, "changed probes (1): probe-0-5: token 3"),
    ],
)
def test_every_failure_is_named_and_alone(found: dict[str, Any], named: str) -> None:
    (failure,) = failures({**GOOD, **found})
    assert named in failure
    assert serving.failed({"soak": {"passed": False, "failures": [failure]}})


def test_an_engine_that_was_cut_or_said_nothing_fails() -> None:
    assert serving.reasons({"failures": [], "error": "exit status -9"}) == ["exit status -9"]
    assert serving.failed({"soak": {"passed": True, "failures": [], "error": "exit status -9"}})
    assert serving.failed({"soak": {}})


class Engine:
    """Answers a request after two steps; each prompt has its own tokens, which ``spoil`` may change."""

    def __init__(self, spoil: Any = None, *, free: bool = True) -> None:
        self.spoil, self.free = spoil or (lambda output, asked: None), free
        self.open: dict[str, list[Any]] = {}
        self.vllm_config = SimpleNamespace(cache_config=SimpleNamespace(num_gpu_blocks=64, block_size=16))

    def add_request(self, name: str, prompt: dict[str, list[int]], sampling: int) -> None:
        self.open[name] = [2, prompt["prompt_token_ids"], sampling]

    def abort_request(self, names: list[str]) -> None:
        for name in names:
            del self.open[name]

    def has_unfinished_requests(self) -> bool:
        return bool(self.open)

    def step(self) -> list[Any]:
        done = []
        for name, asked in list(self.open.items()):
            asked[0] -= 1
            if not asked[0]:
                del self.open[name]
                done.append(self.answer(name, asked))
        return done

    def answer(self, name: str, asked: list[Any]) -> Any:
        _, prompt, tokens = asked
        ids = [(len(prompt) + at) % 50 for at in range(tokens)]
        logprobs = [{token: SimpleNamespace(logprob=-0.5), 99: SimpleNamespace(logprob=-0.6)} for token in ids]
        text = SimpleNamespace(token_ids=ids, logprobs=logprobs, finish_reason="length")
        output = SimpleNamespace(request_id=name, finished=True, outputs=[text])
        self.spoil(output, name)
        return output

    def get_metrics(self) -> list[Any]:
        return [SimpleNamespace(name="vllm:num_preemptions", value=3.0), SimpleNamespace(name="a histogram")]

    def reset_prefix_cache(self) -> bool:
        return self.free


@pytest.fixture
def soaked(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Verdict on an engine after a second of traffic."""
    monkeypatch.setattr(serving_soak, "_sampling", lambda tokens: tokens)

    def run(engine: Engine) -> dict[str, Any]:
        monkeypatch.setattr(serving_soak, "_engine", lambda *_: engine)
        *_, verdict = serving_soak.soak(Path(), 0.2, True)
        return verdict

    return run


def test_traffic_over_an_engine_that_is_right(soaked: Any) -> None:
    found = soaked(Engine())
    assert found["passed"], found["failures"]
    assert found["sent"] == found["done"] + found["cancelled"]
    assert (found["preemptions"], found["ties"], found["blocks"]) == (3, 0, 64)


def spoiled(kind: str) -> Any:
    """Spoils what an engine answers amid the traffic; not what it answers alone."""

    def spoil(output: Any, name: str) -> None:
        text = output.outputs[0]
        if kind == "raises" and name.startswith("noise"):
            raise RuntimeError("the device is gone")
        if kind == "ends" and name.startswith("noise"):
            text.finish_reason = "error"
        if kind == "nan" and name.startswith("noise"):
            text.logprobs[-1][99].logprob = float("nan")
        if kind in ("changes", "unlikely") and name.startswith("probe"):
            text.token_ids[3] = 99 if kind == "changes" else 98

    return spoil


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("raises", "RuntimeError: the device is gone"),
        ("ends", "ended by 'error'"),
        ("nan", "a logprob that is not finite ("),
        ("changes", "token 3 is 99, alone it was 23, which led by 0.100 nats"),
        ("unlikely", "token 3 is 98, alone it was 23, which led by more than all of 2 others"),
    ],
)
def test_an_engine_that_is_wrong_fails(soaked: Any, kind: str, named: str) -> None:
    found = soaked(Engine(spoiled(kind)))
    assert not found["passed"]
    assert any(named in failure for failure in found["failures"]), found["failures"]


def test_blocks_that_nobody_gave_back_fail(soaked: Any) -> None:
    assert soaked(Engine(free=False))["failures"] == ["blocks are still in use after the last request"]


def test_what_parts_at_a_tie_is_counted_and_told(soaked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving_soak, "TIE_IN_FLOAT32", 0.25)
    found = soaked(Engine(spoiled("changes")))
    assert found["passed"], found["failures"]
    assert 0 < found["ties"] == found["probes"]
    assert found["largest_tie_nats"] == pytest.approx(0.1)
    assert found["tie_bound_nats"] == 0.25


def test_the_command_fails_by_its_exit_status_and_writes_what_it_ran(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, found = tmp_path / "soak.json", {"failures": ["no request was answered"]}

    def child(name: str, arguments: Any, model: Any, keep: Any, seconds: float) -> dict[str, Any]:
        keep(found)
        return found

    monkeypatch.setattr(serving, "child", child)
    monkeypatch.setattr(serving, "interruptible", lambda: None)
    monkeypatch.setattr(sys, "argv", ["benchmarks/serving.py", "--quick", "--soak", "0.1", "--out", str(out)])
    with pytest.raises(SystemExit) as ended:
        serving.main()
    assert ended.value.code == 1
    assert "failed: no request was answered" in capsys.readouterr().out
    written = json.loads(out.read_text())
    assert {"commit", "versions", "device"} <= set(written)
    assert written["command"] == "python benchmarks/serving.py --quick --soak 0.1 --out soak.json"
    assert written["results"]["soak"] == found


def test_probes_are_of_several_lengths_that_fit() -> None:
    traffic = Traffic(random.Random(0), 384, 0.01)
    lengths = [len(traffic.probe(number)["prompt_token_ids"]) for number in range(PROBES)]
    assert lengths == sorted(set(lengths))
    assert lengths[-1] + PROBE_TOKENS < 512
