"""Before serving is timed on a GPU: does the plug-in start in vLLM there, and do its engines agree with one another?

    python benchmarks/serving_preflight.py --out results_here
    python benchmarks/serving_preflight.py --out results_here --only eager graphs --seconds 60
    python benchmarks/serving_preflight.py --out results_here --only raw-prompts transformers --model MODEL

Engines of the small model in examples/models/tiny, or of another, answer the same prompts: vLLM's own bf16 cache;
packed pages eagerly, with CUDA graphs of decoding steps alone, compiled with graphs of all steps (vLLM's default), in
chunks with cached prefixes, speculatively, by vLLM's first model runner, and around sleep. Each is asked twice and must
give the same text both times: with a prefix cached since, or before sleep and after. Packed engines must give the eager
one's text too. An engine whose prompts attend to their own raw keys and values (the plug-in's default) does what
turboquant-hf does, whose text must be that of this engine. Texts may part where two tokens were nearly tied. A platform
without sleep mode skips that engine, and says so.

Each engine is a process of its own with ``--seconds`` to answer; its log is ``OUT/preflight-NAME.log``. How it ended is
in ``OUT/preflight.json`` as soon as it has: an engine that hangs loses nothing that others found.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, TypeAlias

from deadline import interruptible, started
from report import write_json
from serving_engine import BESIDE_OTHERS

HERE = Path(__file__).parent
MODEL = HERE.parent / "examples/models/tiny"
PROMPT_LENGTHS = (5, 33, 400, 900)
TOKENS = 32
LOGPROBS = 5
MARK = "ENGINE "
TIE = 0.25
"""Nats: two steps of a bf16 logit between 16 and 32."""
BACKEND = {"attention_backend": "FUSED_TURBOQUANT"}
PACKED = {**BACKEND, "additional_config": {"turboquant": {"prefill": "packed"}}}
SIZES = {"cudagraph_capture_sizes": [1, 4, 16]}
"""Batches that graphs are captured for: one prompt, all four, and all four with three drafts each."""
UNCOMPILED = {"compilation_config": {**SIZES, "mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}}
COMPILED = {"compilation_config": SIZES}
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
EAGER = "eager"
RAW_PROMPTS = "raw-prompts"
TRANSFORMERS = "transformers"
BITS = 4
ENGINES: dict[str, dict[str, Any]] = {
    "bf16": {"enforce_eager": True},
    EAGER: {**PACKED, "enforce_eager": True},
    "graphs": {**PACKED, **UNCOMPILED},
    "chunked": {**PACKED, **UNCOMPILED, "max_num_batched_tokens": 256, "enable_prefix_caching": True},
    "compiled": {**PACKED, **COMPILED},
    "speculative": {**PACKED, **UNCOMPILED, "speculative_config": NGRAM},
    "first-runner": {**PACKED, **UNCOMPILED},
    "sleep": {**PACKED, "enforce_eager": True, "enable_sleep_mode": True},
    RAW_PROMPTS: {**BACKEND, "additional_config": {"turboquant": {"bits": BITS}}, "enforce_eager": True},
    TRANSFORMERS: {},
}
AGAINST = {EAGER: "bf16", RAW_PROMPTS: "bf16", TRANSFORMERS: RAW_PROMPTS}
"""Whose text an engine is compared with: the eager packed one's where nothing else is said."""
VARIABLES = {"first-runner": {"VLLM_USE_V2_MODEL_RUNNER": "0"}}


class NotHereError(RuntimeError):
    """This platform cannot run an engine, whoever computes attention."""


Texts: TypeAlias = list[dict[str, Any]]
"""Tokens and logprobs of each prompt."""


def prompts() -> list[list[int]]:
    """Tokens of each prompt."""
    return [
        [5 + (17 * (number + 1) * at + at * at) % 4000 for at in range(length)]
        for number, length in enumerate(PROMPT_LENGTHS)
    ]


def both_rounds(name: str, model: Path) -> list[Texts] | None:
    """Greedy texts, asked for twice; None where vLLM has no sleep mode and it is asked for."""
    if name != TRANSFORMERS:
        return answer(ENGINES[name], model)
    from serving_transformers import transformers_texts

    return [transformers_texts(model, prompts(), TOKENS, LOGPROBS, BITS) for _ in range(2)]


def answer(settings: dict[str, Any], model: Path) -> list[Texts] | None:
    """:func:`both_rounds` of a vLLM engine."""
    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform

    sleeps = settings.get("enable_sleep_mode", False)
    if sleeps and not current_platform.is_sleep_mode_available():
        return None
    engine = LLM(
        model=str(model), dtype="bfloat16", skip_tokenizer_init=True, max_model_len=1024, seed=0,
        **{**BESIDE_OTHERS, "kv_cache_memory_bytes": 256 << 20, "enable_prefix_caching": False, **settings},
    )  # fmt: skip
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, logprobs=LOGPROBS, ignore_eos=True, detokenize=False)
    given = [{"prompt_token_ids": tokens} for tokens in prompts()]
    first = texts(engine.generate(given, sampling, use_tqdm=False))
    if sleeps:
        engine.sleep(level=1)
        engine.wake_up()
    return [first, texts(engine.generate(given, sampling, use_tqdm=False))]


def texts(results: list[Any]) -> Texts:
    return [
        {
            "tokens": list(result.outputs[0].token_ids),
            "logprobs": [
                {token: entry.logprob for token, entry in step.items()} for step in result.outputs[0].logprobs
            ],
        }
        for result in results
    ]


def ask(name: str, model: Path, out: Path, seconds: float) -> list[Texts]:
    """:func:`both_rounds` of a process of its own.

    Raises:
        NotHereError: vLLM has no sleep mode on this platform.
        RuntimeError: it ended without one, or had none after ``seconds``; its last lines.
    """
    log = out / f"preflight-{name}.log"
    command = [sys.executable, "-u", __file__, "--engine", name, "--model", str(model)]
    # The engine in the process itself: another one would import vLLM again.
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", **VARIABLES.get(name, {})}
    with log.open("w") as sink, started(command, seconds, stdout=sink, stderr=sink, env=environment) as (process, late):
        process.wait()
    text = log.read_text(errors="replace")
    for line in text.splitlines():
        if line.startswith(MARK):
            found: list[Texts] | None = json.loads(line.removeprefix(MARK))
            if found is None:
                raise NotHereError("vLLM has no sleep mode on this platform")
            return found
    reason = f"no answer after {seconds:.0f} s" if late.is_set() else f"exit status {process.returncode}"
    raise RuntimeError(f"{reason}\nThe log ends with\n{text[-3000:]}")


def leads(expected: Texts, got: Texts) -> list[float]:
    """For each prompt whose text differs, how far the expected token led the other where they part, in nats."""
    found = []
    for wanted, other in zip(expected, got, strict=True):
        pairs = zip(wanted["tokens"], other["tokens"], wanted["logprobs"], strict=True)
        parted = next(((a, b, step) for a, b, step in pairs if a != b), None)
        if parted is not None:
            token, taken, step = parted
            found.append(step[str(token)] - step.get(str(taken), float("-inf")))
    return found


def compared(expected: Texts, got: Texts, whose: str, *, exact: bool = True) -> str:
    """How many texts are those of ``whose``.

    Raises:
        RuntimeError: ``exact``, and they part where two tokens were not tied.
    """
    parted = leads(expected, got)
    told = f"{len(expected) - len(parted)} of {len(expected)} texts as {whose}"
    if not parted:
        return told
    told += f" (they part where the expected token led by {max(parted):.2f} nats at most)"
    if exact and max(parted) > TIE:
        raise RuntimeError(f"{told}, no tie")
    return told


def check(name: str, answers: dict[str, list[Texts]], model: Path, out: Path, seconds: float) -> str:
    """What one engine did; raises where its text is not its own of before, or the eager packed engine's, up to ties."""
    first, second = answers[name] = ask(name, model, out, seconds)
    between = "before sleep" if ENGINES[name].get("enable_sleep_mode") else "the first time"
    told = compared(first, second, between)
    against = AGAINST.get(name, EAGER)
    if name == "bf16" or against not in answers:
        return f"{told}; compared with no other engine"
    return f"{told}; " + compared(answers[against][1], second, f"{against}'s", exact=against != "bf16")


def check_all(names: list[str], model: Path, out: Path, seconds: float) -> bool:
    """Whether no engine failed; what each did is printed and written as soon as it ended."""
    answers: dict[str, list[Texts]] = {}
    results: dict[str, Any] = {}
    for name in names:
        began = time.perf_counter()
        try:
            verdict, told = "passed", check(name, answers, model, out, seconds)
        except NotHereError as error:
            verdict, told = "skipped", str(error)
        except RuntimeError as error:
            verdict, told = "failed", str(error)
        results[name] = {
            "passed": None if verdict == "skipped" else verdict == "passed",
            "told": told,
            "seconds": time.perf_counter() - began,
        }
        write_json(out / "preflight.json", results)
        print(f"{name}: {verdict}, {results[name]['seconds']:.0f} s: {told}", flush=True)
    return all(result["passed"] is not False for result in results.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(), help="folder of the logs and of preflight.json")
    parser.add_argument("--only", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--seconds", type=float, default=90.0, help="that an engine has to answer")
    parser.add_argument("--model", type=Path, default=MODEL, help="folder of the model")
    parser.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.engine:
        print(MARK + json.dumps(both_rounds(arguments.engine, arguments.model)), flush=True)
        return
    interruptible()
    arguments.out.mkdir(parents=True, exist_ok=True)
    sys.exit(int(not check_all(arguments.only, arguments.model, arguments.out, arguments.seconds)))


if __name__ == "__main__":
    main()
