"""A process that imports vLLM once and starts an engine for every line of JSON it reads (see ``conftest.Engines``)."""

from __future__ import annotations

import functools
import gc
import json
import os
import sys
import traceback
from typing import Any

from offload import offload_on_cpu

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


def random_weights() -> None:
    """Weights of a random model at which attention matters; vLLM's own are so small that logits hardly differ."""
    import torch
    from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

    @torch.no_grad()
    def load_weights(self: Any, model: torch.nn.Module, model_config: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
            else:
                parameter.uniform_(0.5, 1.5, generator=generator)
            if name.endswith(".A"):
                # A state-space layer decays at negative rates only.
                parameter.neg_()

    DummyModelLoader.load_weights = load_weights


class Weights:
    """Whether vLLM has begun to read weights, or to make those of a random model."""

    read = False

    @classmethod
    def watch(cls) -> None:
        from vllm.model_executor.model_loader.base_loader import BaseModelLoader
        from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
        from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

        for loader in (BaseModelLoader, DefaultModelLoader, DummyModelLoader):
            loader.load_weights = cls._noting(loader.load_weights)

    @classmethod
    def _noting(cls, load: Any) -> Any:
        @functools.wraps(load)
        def load_weights(*args: Any, **kwargs: Any) -> Any:
            cls.read = True
            return load(*args, **kwargs)

        return load_weights


def run(job: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    before = dict(os.environ)
    os.environ.update(job["environment"])
    engine = beside = None
    Weights.read = False
    try:
        engine = LLM(**job["engine"])
        if job.get("beside"):
            beside = LLM(**job["beside"])
        passes = [outputs_of(engine, prompts, job["max_tokens"]) for prompts in job["passes"]]
        counters = {metric.name: getattr(metric, "value", None) for metric in engine.get_metrics()}
        return {
            "blocks": engine.llm_engine.vllm_config.cache_config.num_gpu_blocks,
            "block_size": engine.llm_engine.vllm_config.cache_config.block_size,
            "passes": passes,
            "preemptions": counters.get("vllm:num_preemptions"),
            "accepted": counters.get("vllm:spec_decode_num_accepted_tokens"),
            "loaded": counters.get("vllm:external_prefix_cache_hits"),
            "beside": [outputs_of(beside, prompts, job["max_tokens"]) for prompts in job["passes"] if beside],
        }
    except Exception:  # noqa: BLE001 - the test decides whether this failure was wanted
        return {"error": traceback.format_exc(), "weights_read": Weights.read}
    finally:
        os.environ.clear()
        os.environ.update(before)
        del engine, beside
        gc.collect()
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    random_weights()
    Weights.watch()
    offload_on_cpu()
    for line in sys.stdin:
        print(RESULT + json.dumps(run(json.loads(line))), flush=True)
