"""Real engines on this CPU, with the small trained model of the repository or small random ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

collect_ignore_glob = [] if find_spec("vllm") else ["test_*.py"]

ROOT = Path(__file__).parents[4]
TINY = ROOT / "examples/models/tiny"
TEXT = (ROOT / "examples/data/constitution.txt").read_text()
BACKEND = "FUSED_TURBOQUANT"
CACHE_BYTES = 16 << 20
PAGE = 32
"""Tokens of a block: the least that vLLM's own CPU attention takes."""
ENVIRONMENT = {
    **os.environ,
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_NUM_OF_RESERVED_CPU": str(max((os.cpu_count() or 1) - 1, 0)),
}


@dataclass(frozen=True)
class Run:
    """What an engine did; ``passes`` holds tokens, logprobs and cached tokens of every prompt.

    ``loaded`` counts the tokens that a KV connector brought.
    ``beside`` holds the same of an engine that ran at the same time, if one did.
    """

    blocks: int
    block_size: int
    passes: list[list[dict[str, Any]]]
    preemptions: float | None
    accepted: float | None
    loaded: float | None
    beside: list[list[dict[str, Any]]]

    def tokens(self, number: int = 0) -> list[list[int]]:
        return [output["tokens"] for output in self.passes[number]]


def _packed(turboquant: dict[str, Any] | None) -> dict[str, Any]:
    if turboquant is None:
        return {}
    return {"attention_backend": BACKEND, "additional_config": {"turboquant": turboquant}}


class Engines:
    """Starts one engine after the other in a process that has vLLM loaded."""

    def __init__(self, log: Path, **environment: str) -> None:
        runner = str(Path(__file__).parent / "runner.py")
        self._log = log.open("w", buffering=1)
        self._process = subprocess.Popen(
            [sys.executable, runner],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=ENVIRONMENT | environment,
        )
        self.log = log

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._log.close()

    def answer(
        self,
        passes: list[list[Any]],
        turboquant: dict[str, Any] | None = None,
        *,
        max_tokens: int = 16,
        environment: dict[str, str] | None = None,
        beside: dict[str, Any] | None = None,
        **engine: Any,
    ) -> dict[str, Any]:
        """Raw answer of the runner.

        Args:
            passes: prompts, one batch after the other.
            turboquant: options; None is vLLM's own backend.
            max_tokens: of each answer.
            environment: variables.
            beside: options of a second engine that is alive at the same time.
            engine: further arguments of ``LLM``.
        """
        settings: dict[str, Any] = {
            "model": str(TINY),
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 1024,
            "block_size": PAGE,
            "kv_cache_memory_bytes": CACHE_BYTES,
            "disable_log_stats": False,
        }
        settings |= engine
        job = {
            "engine": settings | _packed(turboquant),
            "beside": None if beside is None else settings | _packed(beside),
            "passes": passes,
            "max_tokens": max_tokens,
            "environment": environment or {},
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(job), file=self._process.stdin, flush=True)
        for line in self._process.stdout:
            if line.startswith("RESULT "):
                answer: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
                return answer
            self._log.write(line)
        self._log.flush()
        raise RuntimeError(f"the engine's process ended: {self.log.read_text()[-4000:]}")

    def __call__(self, passes: list[list[Any]], *args: Any, **kwargs: Any) -> Run:
        answer = self.answer(passes, *args, **kwargs)
        assert "error" not in answer, answer["error"]
        return Run(**answer)

    def unless_vllm_fails(self, passes: list[list[Any]], *args: Any, **kwargs: Any) -> Run:
        """As a call, where vLLM's own attention runs ``kwargs`` too; else a skip that shows vLLM's error."""
        answer = self.answer(passes, *args, **kwargs)
        if "error" in answer:
            with Engines(self.log.with_suffix(".vllm")) as others:
                own = others.answer(passes, **kwargs)
            if "error" in own:
                pytest.skip(f"this vLLM alone fails here: {own['error'].strip().splitlines()[-1]}")
        assert "error" not in answer, answer["error"]
        return Run(**answer)

    def __enter__(self) -> Engines:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def refusal(self, *args: Any, **kwargs: Any) -> str:
        """Message of an engine that must not start, and ends before it has read weights."""
        answer = self.answer([["A"]], *args, **kwargs)
        assert "error" in answer, "the engine started"
        assert not answer["weights_read"], answer["error"]
        return str(answer["error"])


@pytest.fixture
def fresh_engines(tmp_path: Path) -> Iterator[Engines]:
    """A process of its own: vLLM does not start another engine where one had a draft."""
    started = Engines(tmp_path / "log")
    yield started
    started.close()


@pytest.fixture(scope="session")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    started = Engines(tmp_path_factory.mktemp("engines") / "log")
    yield started
    started.close()


@pytest.fixture(scope="session")
def sized_pages() -> None:
    """Skip where windows and hybrid models are refused."""
    from turboquant_vllm.compat import backend_sizes_pages

    if not backend_sizes_pages():
        pytest.skip("before vLLM 0.28 no backend sizes pages of windows or beside state spaces: these are refused")


def disagreement(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> float:
    """Largest lead, in nats, of a token that one run chose over the one that the other chose at the same place.

    Compared up to the first difference of each prompt: what follows has another history. 0 when all are equal.
    """
    worst = 0.0
    for one, other in zip(first, second, strict=True):
        for index, (token, wanted) in enumerate(zip(one["tokens"], other["tokens"], strict=True)):
            if token != wanted:
                step = one["logprobs"][index]
                lead = step[str(token)] - step[str(wanted)] if str(wanted) in step else float("inf")
                worst = max(worst, lead)
                break
    return worst


def drift(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> float:
    """Mean difference of the logprobs of the first new token, in nats, over the likely tokens of both runs."""
    pairs = [(one["logprobs"][0], other["logprobs"][0]) for one, other in zip(first, second, strict=True)]
    differences = [abs(one[token] - other[token]) for one, other in pairs for token in one if token in other]
    return sum(differences) / len(differences)
