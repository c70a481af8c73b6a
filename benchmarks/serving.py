"""Serve with vLLM over packed pages and beside its own caches: blocks, prefill, time per token, and a soak.

    python benchmarks/serving.py                     # a GPU with vLLM 0.26 or newer: Qwen3-8B's shape, random weights
    python benchmarks/serving.py --only bf16 turboquant-4bit --workloads 1x1K 32x8K   # part of it
    python benchmarks/serving.py --minutes 12        # of all; the contenders that matter most come first
    python benchmarks/serving.py --soak 10           # minutes of random traffic over the small trained model instead
    python benchmarks/serving.py --quick             # a CPU: the small model, two short workloads, seconds of traffic

Each contender runs in a process of its own, which is ended after ``--seconds`` or when ``--minutes`` are over; what it
found by then stays. Time per token is taken while every request of a workload decodes; prefill is the time until the
last of them has its first token. Of short prompts both are medians of five rounds. No prefix is cached. A workload that
does not fit into the cache is skipped.

Results are written after each workload, beside those of other contenders that the file already holds; it is refused
when these are of another device or other versions. What engines print goes to $OUT/serving-NAME.log, or to a temporary
folder where OUT is not set; its end is shown when an engine fails. Kernels that were compiled while an engine served
are named in its results; a packed engine must have none.

The soak fails, with reasons and exit status 1, unless requests were answered, cancelled and preempted, none failed or
was lost, all logprobs are finite, every probe answered as it did alone (up to ties of two tokens, which are counted,
the widest told) and all blocks are free at the end.

vLLM finds plug-ins by the metadata of distributions: on a host without network, unpack the wheels that ``nox -s build``
makes into a folder on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from deadline import interruptible, started
from report import commit, facts, table, write_json
from serving_engine import QUICK, WORKLOADS, Setting, Workload, measure
from serving_soak import STARTING_SECONDS, soak

HERE = Path(__file__).parent
TINY = HERE.parent / "examples/models/tiny"
RESULT = "RESULT "
KEYS = ("prefill_s", "token_ms")
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


def packed(bits: int, **options: int) -> dict[str, Any]:
    return {"attention_backend": "FUSED_TURBOQUANT", "additional_config": {"turboquant": {"bits": bits, **options}}}


CONTENDERS: dict[str, dict[str, Any]] = {
    "bf16": {"attention_backend": "FLASH_ATTN"},
    "turboquant-4bit": packed(4),
    "turboquant-3bit": packed(3),
    "turboquant-2bit": packed(2),
    "fp8": {"attention_backend": "FLASH_ATTN", "kv_cache_dtype": "fp8"},
    "int4_per_token_head": {"attention_backend": "TRITON_ATTN", "kv_cache_dtype": "int4_per_token_head"},
    "turboquant-4bit-blocks-of-128": {**packed(4), "block_size": 128},
}
QUICK_CONTENDERS: dict[str, dict[str, Any]] = {"bf16": {}, "turboquant-4bit": packed(4)}
ON_REQUEST: dict[str, dict[str, Any]] = {
    "turboquant-3bit-windows": {**packed(3, sink_tokens=4, recent_tokens=24), "block_size": 512}
}
"""Run only when ``--only`` names them."""
LEAST_SECONDS = 30
"""In which an engine of 8 billion parameters may start and answer at all."""
CAPTURED = [1, 2, 4, 8, 16, 32]
"""Batches that CUDA graphs are captured for: those of the workloads, which keeps the start short."""


def settings(quick: bool, model: Path) -> dict[str, Any]:
    common = {"model": str(model), "dtype": "bfloat16", "load_format": "dummy", "skip_tokenizer_init": True}
    if quick:
        return {**common, "max_model_len": 512, "enforce_eager": True, "kv_cache_memory_bytes": 16 << 20}
    graphs = {"compilation_config": {"cudagraph_capture_sizes": CAPTURED}}
    return {**common, "max_model_len": 36864, "gpu_memory_utilization": 0.9, **graphs}


def run_one(arguments: argparse.Namespace) -> None:
    """The child: one contender, or the soak; prints what it has found each time that there is more."""
    if arguments.soak:
        for result in soak(arguments.model or TINY, arguments.soak * 60, arguments.quick):
            show(result)
        return
    contender = contenders(arguments)[arguments.one]
    for result in measure(Setting({**settings(arguments.quick, arguments.model), **contender}), workloads(arguments)):
        show(result)


def show(result: dict[str, Any]) -> None:
    print(RESULT + json.dumps(result), flush=True)


def contenders(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The chosen ones, in the order of the table."""
    offered = QUICK_CONTENDERS if arguments.quick else CONTENDERS
    chosen = arguments.only or list(offered)
    offered = {**offered, **ON_REQUEST}
    check_names("--only", chosen, list(offered))
    return {name: contender for name, contender in offered.items() if name in chosen}


def workloads(arguments: argparse.Namespace) -> tuple[Workload, ...]:
    """The chosen ones, in the order of the table."""
    offered = {str(workload).replace(" ", ""): workload for workload in (QUICK if arguments.quick else WORKLOADS)}
    chosen = arguments.workloads or list(offered)
    check_names("--workloads", chosen, list(offered))
    return tuple(workload for name, workload in offered.items() if name in chosen)


def check_names(option: str, chosen: list[str], offered: list[str]) -> None:
    unknown = [name for name in chosen if name not in offered]
    if unknown:
        sys.exit(f"{option} names {unknown[0]!r}; there are {', '.join(offered)}")


def child(
    name: str, arguments: argparse.Namespace, model: Path | None, keep: Callable[[dict[str, Any]], None], seconds: float
) -> dict[str, Any]:
    """Run one contender for at most ``seconds``; ``keep`` gets what is known so far each time that there is more.

    Returns:
        The result; with the last lines of what was printed as ``error`` if the process failed: an old vLLM may lack a
        cache type.
    """
    log = Path(os.environ.get("OUT") or tempfile.mkdtemp(), f"serving-{name}.log")
    found: dict[str, Any] = {}
    began = time.monotonic()
    print(f"{name}: starting, log in {log}", flush=True)
    with (
        log.open("w", encoding="utf-8") as sink,
        started(command(name, arguments, model), seconds, stdout=subprocess.PIPE, stderr=sink) as (process, late),
    ):
        for found in _results(process, sink):
            print(f"{name}: {time.monotonic() - began:.0f} s: {_last_line(found)}", flush=True)
            keep(found)
        process.wait()
    stopped_for = compiled_while_serving(log.read_text(encoding="utf-8", errors="replace"))
    if stopped_for:
        found["compiled_while_serving"] = stopped_for
        keep(found)
    if process.returncode:
        reason = f"ended after {seconds:.0f} s" if late.is_set() else f"exit status {process.returncode}"
        found["error"] = f"{reason}\nThe log ends with\n{log.read_text(encoding='utf-8')[-3000:]}"
        keep(found)
        print(f"{name}: {time.monotonic() - began:.0f} s: failed, {reason}", flush=True)
    return found


def compiled_while_serving(log: str) -> list[str]:
    """Names of the Triton kernels that vLLM saw compiled after it began to serve: a request waited for each."""
    return sorted(set(re.findall(r"Triton kernel JIT compilation during inference: (\w+)", log)))


def command(name: str, arguments: argparse.Namespace, model: Path | None) -> list[str]:
    """Command line of a contender's process."""
    words = [sys.executable, __file__, "--one", name, "--soak", str(arguments.soak)]
    words += ["--quick"] if arguments.quick else []
    words += ["--model", str(model)] if model else []
    words += ["--only", name] if not arguments.soak else []
    return [*words, *(["--workloads", *arguments.workloads] if arguments.workloads else [])]


def _results(process: subprocess.Popen[str], sink: TextIO) -> Iterator[dict[str, Any]]:
    """Results among the lines of a child; its other lines go to the log."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(RESULT):
            yield json.loads(line.removeprefix(RESULT))
        else:
            sink.write(line)
            sink.flush()


def _last_line(found: dict[str, Any]) -> str:
    """What a result says last."""
    if not found.get("workloads"):
        return json.dumps({key: value for key, value in found.items() if key != "workloads"})
    name, run = list(found["workloads"].items())[-1]
    return f"{name}: {json.dumps(run)}"


def compare(arguments: argparse.Namespace, out: Path) -> dict[str, Any]:
    """Run the contenders one after the other; ``out`` is written whenever more is known."""
    workloads(arguments)
    names, held = list(contenders(arguments)), earlier(out)
    results = dict(held)

    def keep(name: str, found: dict[str, Any]) -> None:
        results[name] = joined(held.get(name), {"commit": commit(), **found})
        write_json(out, results)

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(QWEN3_8B))
        model = arguments.model or (TINY if arguments.quick else Path(folder))
        end = time.monotonic() + 60 * arguments.minutes
        for name in names:
            seconds = min(arguments.seconds, end - time.monotonic())
            if seconds < LEAST_SECONDS:
                print(f"{name}: not started, {arguments.minutes:g} minutes are over", flush=True)
                continue
            child(name, arguments, model, partial(keep, name), seconds)
    print(summary(results))
    return {name: results.get(name, {"error": "no result"}) for name in names}


def earlier(out: Path) -> dict[str, Any]:
    """Results that ``out`` holds, which stay.

    Raises:
        SystemExit: they are of another device or other versions.
    """
    if not out.is_file():
        return {}
    held, now = json.loads(out.read_text(encoding="utf-8")), facts()
    for name in ("device", "python", "versions"):
        if held[name] != now[name]:
            sys.exit(f"{out} holds results of {name} {held[name]}, this is {now[name]}: choose another file by --out")
    results: dict[str, Any] = held["results"]
    return results


def joined(before: dict[str, Any] | None, found: dict[str, Any]) -> dict[str, Any]:
    """``found`` with the workloads of an earlier run of the same commit that were not run again."""
    if before is None or before.get("commit") != found["commit"]:
        return found
    return {**found, "workloads": {**before.get("workloads", {}), **found.get("workloads", {})}}


def summary(found: dict[str, dict[str, Any]]) -> str:
    """A table of the contenders that have results, and the errors of the others."""
    errors = [f"{name} failed:\n{result['error']}" for name, result in found.items() if "error" in result]
    done = {name: result for name, result in found.items() if result.get("workloads")}
    names = list(dict.fromkeys(name for result in done.values() for name in result["workloads"]))
    columns = [f"{name}: {what}" for name in names for what in ("prefill s", "ms a token")]
    rows = [
        [cache, result["blocks"], *(result["workloads"].get(n, {}).get(k, "-") for n in names for k in KEYS)]
        for cache, result in done.items()
    ]
    return "\n".join([table(["cache", "blocks", *columns], rows), *errors])


def write_soak(out: Path, found: dict[str, Any]) -> None:
    write_json(out, {"soak": found})


def reasons(found: dict[str, Any]) -> list[str]:
    """Why a soak failed, that of its process included."""
    named = list(found.get("failures", ["nothing was found out"]))
    return [*named, found["error"]] if "error" in found else named


def failed(results: dict[str, Any]) -> bool:
    """Whether a soak failed, or a run of ours in a comparison did not end or compiled a kernel while it served."""
    if "soak" in results:
        return bool(reasons(results["soak"]))
    ours = [result for name, result in results.items() if name.startswith("turboquant")]
    return any("error" in result or "compiled_while_serving" in result for result in ours)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a CPU: small model, short workloads")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"some of {', '.join([*CONTENDERS, *ON_REQUEST])}")
    parser.add_argument("--workloads", nargs="+", metavar="NAME", help="some of them, 1x1K for instance")
    parser.add_argument("--minutes", type=float, default=12.0, help="of all contenders together")
    parser.add_argument("--seconds", type=float, default=180.0, help="of each contender")
    parser.add_argument("--soak", type=float, default=0.0, metavar="MINUTES", help="random traffic instead of timing")
    parser.add_argument("--model", type=Path, help="folder of a model; timing needs its config.json only")
    parser.add_argument("--out", type=Path, help="JSON file of the results")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        run_one(arguments)
        return
    interruptible()
    name = "serving_soak.json" if arguments.soak else "serving.json"
    out = arguments.out or HERE / "results" / (f"quick_{name}" if arguments.quick else name)
    if arguments.soak:
        limit = 60 * arguments.soak + STARTING_SECONDS
        keep = partial(write_soak, out)
        results = {"soak": child("soak", arguments, arguments.model, keep, limit)}
        print(json.dumps(results["soak"], indent=1))
        print("\n".join(f"failed: {name}" for name in reasons(results["soak"])) or "passed")
    else:
        results = compare(arguments, out)
    sys.exit(int(failed(results)))


if __name__ == "__main__":
    main()
