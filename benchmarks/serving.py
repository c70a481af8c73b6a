"""Serve with vLLM over packed pages and beside its own caches: blocks, prefill, time per token, and a soak.

    python benchmarks/serving.py                  # a GPU with vLLM 0.26 or newer: Qwen3-8B's shape, random weights
    python benchmarks/serving.py --soak 10        # minutes of random traffic over the small trained model instead
    python benchmarks/serving.py --quick          # a CPU: the small model, two short workloads, seconds of traffic

Each contender runs in a process of its own. Time per token is taken while every request of a workload decodes; prefill
is the time until the last of them has its first token. No prefix is cached.

vLLM finds plug-ins by the metadata of distributions: on a host without network, unpack the wheels that ``nox -s build``
makes into a folder on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from report import table, write_json
from serving_engine import QUICK, WORKLOADS, Setting, measure
from serving_soak import soak

HERE = Path(__file__).parent
TINY = HERE.parent / "examples/models/tiny"
RESULT = "RESULT "
QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def packed(bits: int) -> dict[str, Any]:
    return {"attention_backend": "FUSED_TURBOQUANT", "additional_config": {"turboquant": {"bits": bits}}}


CONTENDERS: dict[str, dict[str, Any]] = {
    "bf16": {"attention_backend": "FLASH_ATTN"},
    "fp8": {"attention_backend": "FLASH_ATTN", "kv_cache_dtype": "fp8"},
    "int4_per_token_head": {"attention_backend": "TRITON_ATTN", "kv_cache_dtype": "int4_per_token_head"},
    "turboquant 4 bit": packed(4),
    "turboquant 3 bit": packed(3),
    "turboquant 2 bit": packed(2),
}
QUICK_CONTENDERS: dict[str, dict[str, Any]] = {"bf16": {}, "turboquant 4 bit": packed(4)}


def settings(quick: bool, model: Path) -> dict[str, Any]:
    common = {"model": str(model), "dtype": "bfloat16", "load_format": "dummy", "skip_tokenizer_init": True}
    if quick:
        return {**common, "max_model_len": 512, "enforce_eager": True, "kv_cache_memory_bytes": 16 << 20}
    return {**common, "max_model_len": 36864, "gpu_memory_utilization": 0.9}


def run_one(arguments: argparse.Namespace) -> None:
    """The child: one contender, or the soak; prints its result."""
    if arguments.soak:
        result = soak(arguments.model or TINY, arguments.soak * 60, arguments.quick)
    else:
        contender = (QUICK_CONTENDERS if arguments.quick else CONTENDERS)[arguments.one]
        setting = Setting({**settings(arguments.quick, arguments.model), **contender})
        result = measure(setting, QUICK if arguments.quick else WORKLOADS)
    print(RESULT + json.dumps(result), flush=True)


def child(name: str, arguments: argparse.Namespace, model: Path | None) -> dict[str, Any]:
    """Result of one contender, or the last lines of what it printed as ``error``: an old vLLM may lack a cache type."""
    command = [sys.executable, __file__, "--one", name, "--soak", str(arguments.soak)]
    command += ["--quick"] if arguments.quick else []
    command += ["--model", str(model)] if model else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    for line in done.stdout.splitlines():
        if line.startswith(RESULT):
            found: dict[str, Any] = json.loads(line.removeprefix(RESULT))
            return found
    return {"error": (done.stdout + done.stderr)[-3000:]}


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    names = list(QUICK_CONTENDERS if arguments.quick else CONTENDERS)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(QWEN3_8B))
        model = arguments.model or (TINY if arguments.quick else Path(folder))
        found = {name: child(name, arguments, model) for name in names}
    print(summary(found))
    return found


def summary(found: dict[str, dict[str, Any]]) -> str:
    done = {name: result for name, result in found.items() if "error" not in result}
    failed = [f"{name} did not run:\n{result['error']}" for name, result in found.items() if "error" in result]
    if not done:
        return "\n".join(failed)
    workloads = list(next(iter(done.values()))["workloads"])
    columns = [f"{name}: {what}" for name in workloads for what in ("prefill s", "ms a token")]
    rows = [
        [name, result["blocks"], *(result["workloads"][w][k] for w in workloads for k in ("prefill_s", "token_ms"))]
        for name, result in done.items()
    ]
    return "\n".join([table(["cache", "blocks", *columns], rows), *failed])


def failed(results: dict[str, Any]) -> bool:
    """Whether a soak failed, or a run of ours in a comparison did not end."""
    if "soak" in results:
        return not results["soak"].get("passed", False)
    return any("error" in result for name, result in results.items() if name.startswith("turboquant"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a CPU: small model, short workloads")
    parser.add_argument("--soak", type=float, default=0.0, metavar="MINUTES", help="random traffic instead of timing")
    parser.add_argument("--model", type=Path, help="folder of a model; timing needs its config.json only")
    parser.add_argument("--out", type=Path, help="JSON file of the results")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        run_one(arguments)
        return
    if arguments.soak:
        results = {"soak": child("soak", arguments, arguments.model)}
        print(json.dumps(results["soak"], indent=1))
    else:
        results = compare(arguments)
    name = "serving_soak.json" if arguments.soak else "serving.json"
    write_json(arguments.out or HERE / "results" / (f"quick_{name}" if arguments.quick else name), results)
    sys.exit(int(failed(results)))


if __name__ == "__main__":
    main()
