"""Time workloads in one vLLM engine, step by step."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

WARM_TOKENS = 4


@dataclass(frozen=True)
class Workload:
    """``requests`` prompts of ``tokens`` random tokens at once; ``timed`` tokens of each are timed."""

    requests: int
    tokens: int
    timed: int = 64

    def __str__(self) -> str:
        length = f"{self.tokens // 1024}K" if self.tokens >= 1024 else str(self.tokens)
        return f"{self.requests} x {length}"


WORKLOADS = (Workload(1, 1024), Workload(1, 32768), Workload(32, 1024), Workload(32, 8192), Workload(16, 32768))
QUICK = (Workload(1, 64, 8), Workload(3, 64, 8))


@dataclass(frozen=True)
class Setting:
    """Arguments of ``LLM``; a prefix is never cached, so that every prefill is one."""

    arguments: dict[str, Any] = field(default_factory=dict)

    def engine(self) -> Any:
        from vllm import LLM

        return LLM(**{"enable_prefix_caching": False, **self.arguments})


def measure(setting: Setting, workloads: tuple[Workload, ...]) -> dict[str, Any]:
    """Blocks, and prefill seconds and milliseconds per token of each workload."""
    engine = setting.engine().llm_engine
    cache = engine.vllm_config.cache_config
    vocabulary = engine.vllm_config.model_config.get_vocab_size()
    found = {}
    for workload in workloads:
        # A first round compiles and captures what is made on demand.
        run(engine, Workload(workload.requests, min(workload.tokens, 256), 4), vocabulary)
        found[str(workload)] = run(engine, workload, vocabulary)
    return {"blocks": cache.num_gpu_blocks, "block_size": cache.block_size, "workloads": found}


def run(engine: Any, workload: Workload, vocabulary: int) -> dict[str, float]:
    """Prefill until all requests have a token, then time the steps in which all of them decode."""
    from vllm import SamplingParams

    # Requests that come first decode while the others are still prompts: they need tokens for as many steps.
    budget = engine.vllm_config.scheduler_config.max_num_batched_tokens
    spare = -(-workload.requests * workload.tokens // budget) + workload.requests
    sampling = SamplingParams(
        temperature=0, max_tokens=WARM_TOKENS + workload.timed + 2 * spare + 8, ignore_eos=True, detokenize=False
    )
    started = time.perf_counter()
    for number in range(workload.requests):
        prompt = [(31 * number + 7919 * position) % (vocabulary - 1) for position in range(workload.tokens)]
        engine.add_request(str(number), {"prompt_token_ids": prompt}, sampling)
    counts = {str(number): 0 for number in range(workload.requests)}
    prefill = _step_until(engine, counts, 1) - started
    base = min(counts.values()) + WARM_TOKENS
    begin = _step_until(engine, counts, base)
    end = _step_until(engine, counts, base + workload.timed)
    engine.abort_request(list(counts))
    while engine.has_unfinished_requests():
        engine.step()
    return {"prefill_s": prefill, "token_ms": 1e3 * (end - begin) / workload.timed}


def _step_until(engine: Any, counts: dict[str, int], tokens: int) -> float:
    """Step until every request has ``tokens``; the time then."""
    while min(counts.values()) < tokens:
        for output in engine.step():
            counts[output.request_id] = len(output.outputs[0].token_ids)
    return time.perf_counter()
