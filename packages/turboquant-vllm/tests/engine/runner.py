"""A process that imports vLLM once and starts an engine for every line of JSON it reads (see ``conftest.Engines``)."""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from typing import Any

RESULT = "RESULT "


def outputs_of(engine: Any, prompts: list[Any], max_tokens: int) -> list[dict[str, Any]]:
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=max_tokens, logprobs=20, ignore_eos=True)
    given = [prompt if isinstance(prompt, str) else {"prompt_token_ids": prompt} for prompt in prompts]
    results = engine.generate(given, sampling, use_tqdm=False)
    return [
        {
            "tokens": list(result.outputs[0].token_ids),
            "logprobs": [
                {token: entry.logprob for token, entry in step.items()} for step in result.outputs[0].logprobs
            ],
            "cached": result.num_cached_tokens,
        }
        for result in results
    ]


def run(job: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    os.environ.update(job["environment"])
    engine = None
    try:
        engine = LLM(**job["engine"])
        passes = [outputs_of(engine, prompts, job["max_tokens"]) for prompts in job["passes"]]
        counters = {metric.name: getattr(metric, "value", None) for metric in engine.get_metrics()}
        return {
            "blocks": engine.llm_engine.vllm_config.cache_config.num_gpu_blocks,
            "block_size": engine.llm_engine.vllm_config.cache_config.block_size,
            "passes": passes,
            "preemptions": counters.get("vllm:num_preemptions"),
            "accepted": counters.get("vllm:spec_decode_num_accepted_tokens"),
        }
    except Exception:  # noqa: BLE001 - the test decides whether this failure was wanted
        return {"error": traceback.format_exc()}
    finally:
        for name in job["environment"]:
            del os.environ[name]
        del engine
        gc.collect()
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    for line in sys.stdin:
        print(RESULT + json.dumps(run(json.loads(line))), flush=True)
