"""Time workloads in one vLLM engine, step by step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

WARM_TOKENS = 4
ROUNDS = 5
SHORT_PROMPT = 1024
"""Tokens of a prompt that takes a few hundredths of a second: one such time says more of the host than of the cache."""
BESIDE_OTHERS = {"gpu_memory_utilization": 0.1}
"""For engines of the small model that are not timed, on a GPU that others use too. vLLM does not start unless this
share of the memory is free, 92 % of it by default, even where ``kv_cache_memory_bytes`` alone sizes the cache; a tenth
of 80 GB still holds such a model, its cache and its graphs. On a CPU the share is one of the host's memory, and bounds
nothing where the cache has a size."""


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


def measure(setting: Setting, workloads: tuple[Workload, ...]) -> Iterator[dict[str, Any]]:
    """Blocks and seconds to start, then prefill seconds and milliseconds per token: all that is known so far."""
    started = time.perf_counter()
    engine = setting.engine().llm_engine
    cache = engine.vllm_config.cache_config
    found: dict[str, Any] = {
        "start_s": time.perf_counter() - started,
        "blocks": cache.num_gpu_blocks,
        "block_size": cache.block_size,
        "workloads": {},
    }
    yield found
    for workload in workloads:
        found["workloads"][str(workload)] = _timed(engine, workload)
        yield found


def _timed(engine: Any, workload: Workload) -> dict[str, Any]:
    cache = engine.vllm_config.cache_config
    needed = workload.requests * (workload.tokens + _max_tokens(engine, workload))
    if needed > cache.num_gpu_blocks * cache.block_size:
        return {"skipped": f"{needed} tokens do not fit into {cache.num_gpu_blocks} blocks of {cache.block_size}"}
    # First rounds compile what is made on demand: for prompts of this length, and for batches of this size.
    run(engine, Workload(1, workload.tokens, 4))
    run(engine, Workload(workload.requests, min(workload.tokens, 256), 4))
    rounds = [run(engine, workload) for _ in range(ROUNDS if workload.tokens <= SHORT_PROMPT else 1)]
    return {key: statistics.median(found[key] for found in rounds) for key in rounds[0]}


def _max_tokens(engine: Any, workload: Workload) -> int:
    """Requests that come first decode while the others are still prompts: they need tokens for as many steps."""
    budget = engine.vllm_config.scheduler_config.max_num_batched_tokens
    spare = -(-workload.requests * workload.tokens // budget) + workload.requests
    return WARM_TOKENS + workload.timed + 2 * spare + 8


def run(engine: Any, workload: Workload) -> dict[str, Any]:
    """Prefill until all requests have a token, then time the steps in which all of them decode."""
    from vllm import SamplingParams

    vocabulary = engine.vllm_config.model_config.get_vocab_size()
    sampling = SamplingParams(
        temperature=0, max_tokens=_max_tokens(engine, workload), ignore_eos=True, detokenize=False
    )
    prompts = {
        str(number): [(31 * number + 7919 * position) % (vocabulary - 1) for position in range(workload.tokens)]
        for number in range(workload.requests)
    }
    counts = dict.fromkeys(prompts, 0)
    started = time.perf_counter()
    for name, prompt in prompts.items():
        engine.add_request(name, {"prompt_token_ids": prompt}, sampling)
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
