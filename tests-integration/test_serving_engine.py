"""How often a workload is run, and what is told of the rounds."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import serving_engine
from serving_engine import ROUNDS, SHORT_PROMPT, Workload

WARM_ROUNDS = 2


def engine(blocks: int) -> Any:
    return SimpleNamespace(
        vllm_config=SimpleNamespace(
            cache_config=SimpleNamespace(num_gpu_blocks=blocks, block_size=16),
            scheduler_config=SimpleNamespace(max_num_batched_tokens=8192),
        )
    )


@pytest.mark.parametrize(("tokens", "rounds"), [(SHORT_PROMPT, ROUNDS), (SHORT_PROMPT + 1, 1)])
def test_short_prompts_are_medians(monkeypatch: pytest.MonkeyPatch, tokens: int, rounds: int) -> None:
    ran: list[Workload] = []

    def run(_: Any, workload: Workload) -> dict[str, float]:
        ran.append(workload)
        # The first round that counts is an outlier.
        outlier = 10.0 if len(ran) == WARM_ROUNDS + 1 else 0.0
        return {"prefill_s": len(ran) + outlier, "token_ms": float(len(ran))}

    monkeypatch.setattr(serving_engine, "run", run)
    found = serving_engine._timed(engine(10_000), Workload(2, tokens))
    assert [workload.tokens for workload in ran[WARM_ROUNDS:]] == rounds * [tokens]
    assert found == ({"prefill_s": 6.0, "token_ms": 5.0} if rounds > 1 else {"prefill_s": 13.0, "token_ms": 3.0})


def test_what_does_not_fit_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving_engine, "run", lambda *_: pytest.fail("it ran"))
    assert "do not fit into 10 blocks of 16" in serving_engine._timed(engine(10), Workload(1, 1024))["skipped"]
