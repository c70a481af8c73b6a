"""Before serving is timed on a GPU: does the plug-in start in vLLM there, and do its engines agree with one another?

    python benchmarks/serving_preflight.py --out results_here

Engines of the small model in examples/models/tiny answer the same prompts: vLLM's own bf16 cache; packed pages eagerly,
with CUDA graphs, in chunks with cached prefixes, and speculatively. Packed engines must give the eager one's text,
except where two tokens were nearly tied. Each engine is a process of its own; its log is ``OUT/preflight-NAME.log``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from serving_soak import TIE

HERE = Path(__file__).parent
MODEL = HERE.parent / "examples/models/tiny"
PROMPT_LENGTHS = (5, 33, 400, 900)
TOKENS = 32
MARK = "ENGINE "
PACKED = {"attention_backend": "FUSED_TURBOQUANT", "additional_config": {"turboquant": {"prefill": "packed"}}}
GRAPHS = {"compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8]}}
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
EAGER = "eager"
ENGINES: dict[str, dict[str, Any]] = {
    "bf16": {"enforce_eager": True},
    EAGER: {**PACKED, "enforce_eager": True},
    "graphs": {**PACKED, **GRAPHS},
    "chunked": {**PACKED, **GRAPHS, "max_num_batched_tokens": 256, "enable_prefix_caching": True},
    "speculative": {**PACKED, **GRAPHS, "speculative_config": NGRAM},
}


def answer(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Greedy tokens and logprobs of each prompt, asked twice: the second time a prefix may be cached."""
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=str(MODEL), dtype="bfloat16", skip_tokenizer_init=True, max_model_len=1024, seed=0,
        **{"kv_cache_memory_bytes": 256 << 20, "enable_prefix_caching": False, **settings},
    )  # fmt: skip
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, logprobs=5, ignore_eos=True, detokenize=False)
    prompts = [
        {"prompt_token_ids": [5 + (17 * (number + 1) * at + at * at) % 4000 for at in range(length)]}
        for number, length in enumerate(PROMPT_LENGTHS)
    ]
    for _ in range(2):
        results = engine.generate(prompts, sampling, use_tqdm=False)
    return [
        {
            "tokens": list(result.outputs[0].token_ids),
            "logprobs": [
                {token: entry.logprob for token, entry in step.items()} for step in result.outputs[0].logprobs
            ],
        }
        for result in results
    ]


def ask(name: str, out: Path) -> list[dict[str, Any]]:
    """:func:`answer` of a process of its own.

    Raises:
        RuntimeError: it ended without one; its last lines.
    """
    log = out / f"preflight-{name}.log"
    with log.open("w") as sink:
        subprocess.run([sys.executable, __file__, "--engine", name], stdout=sink, stderr=sink, check=False)
    text = log.read_text(errors="replace")
    for line in text.splitlines():
        if line.startswith(MARK):
            found: list[dict[str, Any]] = json.loads(line.removeprefix(MARK))
            return found
    raise RuntimeError(text[-3000:])


def leads(expected: list[dict[str, Any]], got: list[dict[str, Any]]) -> list[float]:
    """For each prompt whose text differs, how far the expected token led the other where they part, in nats."""
    found = []
    for wanted, other in zip(expected, got, strict=True):
        pairs = zip(wanted["tokens"], other["tokens"], wanted["logprobs"], strict=True)
        parted = next(((a, b, step) for a, b, step in pairs if a != b), None)
        if parted is not None:
            token, taken, step = parted
            found.append(step[str(token)] - step.get(str(taken), float("-inf")))
    return found


def check(name: str, answers: dict[str, Any], out: Path) -> str:
    """What one engine did; raises where its text is not the eager packed engine's up to ties."""
    started = time.perf_counter()
    answers[name] = ask(name, out)
    seconds = f"{time.perf_counter() - started:.0f} s"
    if name == "bf16" or EAGER not in answers:
        return seconds
    against = "bf16" if name == EAGER and "bf16" in answers else EAGER
    parted = leads(answers[against], answers[name])
    told = f"{seconds}; {len(PROMPT_LENGTHS) - len(parted)} of {len(PROMPT_LENGTHS)} texts as {against}'s"
    if against == EAGER and any(lead > TIE for lead in parted):
        raise RuntimeError(f"{told}; it parts where the expected token led by {max(parted):.2f} nats, no tie")
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(), help="folder of the logs")
    parser.add_argument("--only", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.engine:
        print(MARK + json.dumps(answer(ENGINES[arguments.engine])), flush=True)
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    answers: dict[str, Any] = {}
    failures = 0
    for name in arguments.only:
        try:
            print(f"{name}: passed, {check(name, answers, arguments.out)}", flush=True)
        except RuntimeError as error:
            failures += 1
            print(f"{name}: failed: {error}", flush=True)
    sys.exit(int(failures > 0))


if __name__ == "__main__":
    main()
