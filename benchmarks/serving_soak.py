"""Random traffic: arrivals, lengths and cancellations, with probes whose answers must not change."""

from __future__ import annotations

import math
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from serving_engine import Setting

PROBES = 4
PROBE_TOKENS = 24
TIE = 0.25
"""Nats: two steps of a bf16 logit between 16 and 32. Sums are rounded in another order when the batch is another, or a
prefix was cached, which may turn what is nearly a tie of two tokens; such turns are counted."""


@dataclass
class Traffic:
    """What has happened so far.

    Attributes:
        random: of arrivals, lengths and cancellations.
        expected: tokens and logprobs of each probe, asked alone.
        open: requests under way.
    """

    random: random.Random
    expected: list[Any] = field(default_factory=list)
    open: set[str] = field(default_factory=set)
    counts: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("sent", "done", "cancelled", "probes", "ties"), 0)
    )
    wrong: list[str] = field(default_factory=list)


def soak(model: Path, seconds: float, quick: bool) -> dict[str, Any]:
    """Traffic for ``seconds``; passed when nothing is lost, no logprob is NaN and every probe answers the same."""
    turboquant = {"attention_backend": "FUSED_TURBOQUANT", "additional_config": {"turboquant": {"prefill": "packed"}}}
    size = {
        "kv_cache_memory_bytes": (4 if quick else 512) << 20,
        "enforce_eager": quick,
        "max_model_len": 512 if quick else 4096,
        "dtype": "float32" if quick else "bfloat16",
    }
    setting = Setting(
        {"model": str(model), "skip_tokenizer_init": True, "enable_prefix_caching": True, **size, **turboquant}
    )
    engine = setting.engine().llm_engine
    limit = size["max_model_len"] - 64
    traffic = Traffic(random.Random(0))
    for number in range(PROBES):
        traffic.expected.append(_alone(engine, number))
    started = time.monotonic()
    while time.monotonic() - started < seconds or (traffic.open and engine.has_unfinished_requests()):
        if time.monotonic() - started < seconds:
            _arrivals(engine, traffic, limit)
        # An engine with nothing to do waits for ever.
        for output in engine.step() if engine.has_unfinished_requests() else ():
            _receive(traffic, output)
    lost = traffic.counts["sent"] - traffic.counts["done"] - traffic.counts["cancelled"]
    passed = not traffic.wrong and lost == 0 and traffic.counts["probes"] > 0
    return {"passed": passed, "seconds": seconds, **traffic.counts, "lost": lost, "wrong": traffic.wrong[:10]}


def _sampling(tokens: int) -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=tokens, logprobs=5, ignore_eos=True, detokenize=False)


def _probe(number: int) -> dict[str, list[int]]:
    length = 20 + 60 * number
    return {"prompt_token_ids": [5 + (17 * (number + 1) * position) % 4000 for position in range(length)]}


def _alone(engine: Any, number: int) -> Any:
    engine.add_request(f"alone-{number}", _probe(number), _sampling(PROBE_TOKENS))
    final = None
    while engine.has_unfinished_requests():
        final = (engine.step() or [final])[-1]
    assert final is not None
    return final.outputs[0]


def _arrivals(engine: Any, traffic: Traffic, limit: int) -> None:
    dice = traffic.random
    while len(traffic.open) < 64 and dice.random() < 0.4:
        number = traffic.counts["sent"]
        traffic.counts["sent"] += 1
        if dice.random() < 0.2:
            which = dice.randrange(PROBES)
            name, prompt, tokens = f"probe-{which}-{number}", _probe(which), PROBE_TOKENS
        else:
            length = int(math.exp(dice.uniform(0, math.log(limit - 64))))
            prompt = {"prompt_token_ids": [dice.randrange(4000) for _ in range(max(length, 1))]}
            name, tokens = f"noise-{number}", dice.randint(1, 64)
        engine.add_request(name, prompt, _sampling(tokens))
        traffic.open.add(name)
    noise = sorted(name for name in traffic.open if name.startswith("noise"))
    if noise and dice.random() < 0.05:
        cancelled = dice.choice(noise)
        engine.abort_request([cancelled])
        traffic.open.discard(cancelled)
        traffic.counts["cancelled"] += 1


def _receive(traffic: Traffic, output: Any) -> None:
    if not output.finished or output.request_id not in traffic.open:
        return
    traffic.open.discard(output.request_id)
    traffic.counts["done"] += 1
    answer = output.outputs[0]
    if any(not math.isfinite(entry.logprob) for step in answer.logprobs for entry in step.values()):
        traffic.wrong.append(f"{output.request_id}: a logprob is not finite")
    if output.request_id.startswith("probe"):
        traffic.counts["probes"] += 1
        _compare(traffic, output.request_id, answer)


def _compare(traffic: Traffic, name: str, answer: Any) -> None:
    expected = traffic.expected[int(name.split("-")[1])]
    for index, (token, wanted) in enumerate(zip(answer.token_ids, expected.token_ids, strict=True)):
        if token == wanted:
            continue
        step = expected.logprobs[index]
        if token not in step or step[wanted].logprob - step[token].logprob > TIE:
            traffic.wrong.append(f"{name}: token {index} is {token}, alone it was {wanted}")
        else:
            traffic.counts["ties"] += 1
        return
