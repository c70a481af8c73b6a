"""Random traffic: arrivals, lengths, cancellations and preemptions, with probes whose answers must not change.

The cache holds twice the longest request, so that requests are preempted and cached prefixes evicted all the time.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from serving_engine import BESIDE_OTHERS, Setting
from serving_traffic import PROBE_TOKENS, PROBES, TIE, TIE_IN_FLOAT32, Traffic
from serving_verdict import SHOWN, failures

NOISE_TOKENS = 64
MOST_OPEN = 64
BLOCK_SIZE = 16
PROGRESS_SECONDS = 30.0
DRAIN_SECONDS = 120.0
"""That the requests which are open at the end may take."""
STARTING_SECONDS = 300.0
"""That a soak may need to start, to ask its probes and to let the last requests end."""


def soak(model: Path, seconds: float, quick: bool) -> Iterator[dict[str, Any]]:
    """Traffic for ``seconds``: what is known so far, again and again; the last result is the verdict.

    Args:
        model: folder of the model.
        seconds: in which requests arrive.
        quick: a CPU: float32 and short prompts.
    """
    length = 512 if quick else 4096
    engine = _engine(model, length, quick)
    traffic = Traffic(random.Random(0), length - 2 * NOISE_TOKENS, TIE_IN_FLOAT32 if quick else TIE)
    free, began = None, time.monotonic()
    try:
        traffic.expected += [_alone(engine, traffic, number) for number in range(PROBES)]
        for _ in _drive(engine, traffic, seconds):
            yield _result(engine, traffic, time.monotonic() - began, over=False)
        free = _all_free(engine, traffic)
    except Exception as error:  # noqa: BLE001 - whatever ends the engine is a finding, beside what was counted before
        traffic.errors.append(f"{type(error).__name__}: {error}")
    yield _result(engine, traffic, time.monotonic() - began, over=free is not None, free=free)


def _engine(model: Path, length: int, quick: bool) -> Any:
    turboquant = {"attention_backend": "FUSED_TURBOQUANT", "additional_config": {"turboquant": {"prefill": "packed"}}}
    size = {
        **BESIDE_OTHERS,
        "kv_cache_memory_bytes": (16 if quick else 512) << 20,
        "block_size": BLOCK_SIZE,
        "num_gpu_blocks_override": 2 * length // BLOCK_SIZE,
        "enforce_eager": quick,
        "max_model_len": length,
        "dtype": "float32" if quick else "bfloat16",
    }
    counted = {"skip_tokenizer_init": True, "enable_prefix_caching": True, "disable_log_stats": False}
    return Setting({"model": str(model), **counted, **size, **turboquant}).engine().llm_engine


def _drive(engine: Any, traffic: Traffic, seconds: float) -> Iterator[None]:
    """Let requests arrive for ``seconds`` and wait for the last ones; stops now and then for a look at the counts."""
    began = shown = time.monotonic()
    while (now := time.monotonic()) < began + seconds or (traffic.open and now < began + seconds + DRAIN_SECONDS):
        if now < began + seconds:
            _arrivals(engine, traffic)
        # An engine with nothing to do waits for ever.
        for output in engine.step() if engine.has_unfinished_requests() else ():
            traffic.receive(output)
        if now - shown > PROGRESS_SECONDS:
            shown = now
            yield


def _result(engine: Any, traffic: Traffic, seconds: float, *, over: bool, free: bool | None = None) -> dict[str, Any]:
    cache, counts = engine.vllm_config.cache_config, traffic.counts
    found: dict[str, Any] = {
        "over": over,
        "seconds": seconds,
        "blocks": cache.num_gpu_blocks,
        "block_size": cache.block_size,
        **counts,
        "preemptions": _preemptions(engine),
        "lost": counts["sent"] - counts["done"] - counts["cancelled"] if over else 0,
        "all_blocks_free": free,
        "largest_tie_nats": traffic.largest_tie,
        "tie_bound_nats": traffic.tie,
    }
    wrong = {"changed": traffic.changed, "not_finite": traffic.not_finite, "errors": traffic.errors}
    named = failures({**found, **wrong})
    return {"passed": not named, "failures": named, **found, **{kind: some[:SHOWN] for kind, some in wrong.items()}}


def _preemptions(engine: Any) -> int | None:
    """Requests that gave their blocks to others and were computed again; None where this vLLM does not count them."""
    counted = [metric.value for metric in engine.get_metrics() if metric.name == "vllm:num_preemptions"]
    return int(sum(counted)) if counted else None


def _all_free(engine: Any, traffic: Traffic) -> bool:
    """Ask the probes alone once more; whether no block is in use then, the condition to empty a prefix cache."""
    for number in range(PROBES):
        traffic.compare(f"probe-{number}-last", _alone(engine, traffic, number))
    return bool(engine.reset_prefix_cache())


def _sampling(tokens: int) -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=tokens, logprobs=5, ignore_eos=True, detokenize=False)


def _alone(engine: Any, traffic: Traffic, number: int) -> Any:
    engine.add_request(f"alone-{number}", traffic.probe(number), _sampling(PROBE_TOKENS))
    final = None
    while engine.has_unfinished_requests():
        final = (engine.step() or [final])[-1]
    assert final is not None
    traffic.check_finite(final)
    return final.outputs[0]


def _arrivals(engine: Any, traffic: Traffic) -> None:
    dice = traffic.random
    while len(traffic.open) < MOST_OPEN and dice.random() < 0.4:
        number = traffic.counts["sent"]
        traffic.counts["sent"] += 1
        if dice.random() < 0.2:
            which = dice.randrange(PROBES)
            name, prompt, tokens = f"probe-{which}-{number}", traffic.probe(which), PROBE_TOKENS
        else:
            length = int(math.exp(dice.uniform(0, math.log(traffic.longest))))
            prompt = {"prompt_token_ids": [dice.randrange(4000) for _ in range(max(length, 1))]}
            name, tokens = f"noise-{number}", dice.randint(1, NOISE_TOKENS)
        engine.add_request(name, prompt, _sampling(tokens))
        traffic.open.add(name)
    noise = sorted(name for name in traffic.open if name.startswith("noise"))
    if noise and dice.random() < 0.05:
        cancelled = dice.choice(noise)
        engine.abort_request([cancelled])
        traffic.open.discard(cancelled)
        traffic.counts["cancelled"] += 1
