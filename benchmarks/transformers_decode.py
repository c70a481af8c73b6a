"""Decode speed and memory of Transformers' caches and of packed ones, on one model, in one run.

The model has the shape of Qwen3-8B and random weights: speed and memory do not depend on them. For each batch and
context every cache gets the same random prompt in one forward pass, then decodes token by token: first untimed steps,
then as many timed ones as the file says, none of which compiles a kernel. Reported are the median step and tokens per
second of the whole batch in it, peak memory of the prompt and of decoding, and bytes of keys and values.
Caches of fixed room, stock and packed, decode in a step that is compiled whole, and in one that is recorded in CUDA
graphs besides; their prompt is not. What cannot run is listed with the reason. The file is written after every row,
targets met and missed in it; steps that are run as they are come first.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import torch
from contenders import Contender, contenders, stored_bytes
from decode_modes import MODES, Mode, one_graph, why_not
from decode_steps import Take, decode, room
from decode_targets import stock_of, targets
from report import table, write_json
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from turboquant_hf.compat import CACHE_ARGUMENT

HERE = Path(__file__).parent
CASES = ((1, 4096), (8, 4096), (1, 32768), (8, 32768), (1, 131072), (8, 131072))
QUICK_CASES = ((1, 64), (2, 64))
# Qwen3-8B's config.json.
SHAPE = {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 131072 + 1024,
    "rope_theta": 1000000,
}
QUICK_SHAPE = SHAPE | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}


def random_model(shape: dict[str, Any], device: torch.device) -> Any:
    """A model in bfloat16 with random weights, made on ``device``."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            return Qwen3ForCausalLM(Qwen3Config(**shape)).eval()
    finally:
        torch.set_default_dtype(previous)


@contextmanager
def peak_memory(device: torch.device, into: dict[str, Any], name: str) -> Iterator[None]:
    """Note the most bytes that were allocated within the block; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    yield
    if device.type == "cuda":
        into[name] = torch.cuda.max_memory_allocated()


def greedy(step: Callable[..., Any], cache: Any, token: Tensor) -> Take:
    """Steps of a model over ``cache``, each of which takes the token of the one before; the first ``token``."""

    def take() -> float:
        nonlocal token
        start = time.perf_counter()
        token = step(token, **{CACHE_ARGUMENT: cache}).logits[:, -1].argmax(-1, keepdim=True)
        token.cpu()  # as a stopping criterion does: a step ends when its token is known
        return time.perf_counter() - start

    return take


@torch.no_grad()
def measure(model: Any, contender: Contender, prompt: Tensor, steps: int, backend: str) -> dict[str, Any]:
    """Figures of one cache on one prompt ``[batch, context]``."""
    row: dict[str, Any] = {}
    device = prompt.device
    with contender.prepare(model, prompt.shape[1] + room(steps)) as cache:
        with peak_memory(device, row, "prompt_peak_bytes"):
            start = time.perf_counter()
            logits = model(prompt, **{CACHE_ARGUMENT: cache}, logits_to_keep=1).logits
            token = logits[:, -1].argmax(-1, keepdim=True)
            token.cpu()
            row["prompt_seconds"] = time.perf_counter() - start
        with peak_memory(device, row, "decode_peak_bytes"), one_graph(model, contender.mode, backend) as step:
            row |= decode(greedy(step, cache, token), steps).row(prompt.shape[0])
        row["kv_bytes"] = stored_bytes(cache)
    return row


def least_bytes(model: Any, batch: int, context: int) -> int:
    """Bytes that any cache needs for a prompt besides the weights: the two inputs of an MLP's product and its output.

    They are ``[batch, context, intermediate_size]`` in the model's dtype; a prompt is one forward pass.
    """
    return 3 * batch * context * model.config.intermediate_size * model.dtype.itemsize


def too_large(model: Any, batch: int, context: int, memory: int | None) -> str | None:
    """Why a prompt cannot fit into ``memory`` bytes with any cache; None when it might, or on a CPU."""
    needed = least_bytes(model, batch, context) + sum(weight.nbytes for weight in model.parameters())
    if memory is None or needed <= memory:
        return None
    return f"weights and one layer's activations take {needed / 2**30:.0f} GiB of {memory / 2**30:.0f} GiB"


def attempt(model: Any, contender: Contender, prompt: Tensor, steps: int, backend: str) -> dict[str, Any]:
    """:func:`measure`, or the reason why there are no figures."""
    device = prompt.device
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    reason = contender.absent or why_not(contender.mode, device) or too_large(model, *prompt.shape, memory)
    if reason is not None:
        return {"reason": reason}
    try:
        return measure(model, contender, prompt, steps, backend)
    except Exception as error:  # noqa: BLE001 - a rival's failure is a result, and is printed
        return {"reason": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
    finally:
        gc.collect()
        if prompt.device.type == "cuda":
            torch.cuda.empty_cache()


def compare(
    model: Any,
    cases: tuple[tuple[int, int], ...],
    modes: tuple[Mode, ...],
    attempt_one: Callable[[Contender, Tensor], dict[str, Any]],
    write: Callable[[list[dict[str, Any]]], None],
) -> list[dict[str, Any]]:
    """One row for each mode, case and contender; ``write`` is called with those so far after each."""
    rows: list[dict[str, Any]] = []
    for mode, (batch, context) in product(modes, cases):
        generator = torch.Generator().manual_seed(context)
        prompt = torch.randint(2, model.config.vocab_size, (batch, context), generator=generator).to(model.device)
        for contender in contenders(mode):
            row = {"batch": batch, "context": context, "cache": contender.name}
            row |= attempt_one(contender, prompt)
            rows.append(row)
            print({key: value for key, value in row.items() if value is not None}, flush=True)
            write(rows)
    return rows


def _gib(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**30:.2f}"


def decode_table(rows: list[dict[str, Any]]) -> str:
    """Figures of all rows, speed relative to the ordinary cache of the same case whose steps are run alike too."""
    speeds = {(row["batch"], row["context"], row["cache"]): row.get("tokens_per_second") for row in rows}
    lines = []
    for row in rows:
        case = (row["batch"], row["context"])
        speed, stock = speeds[*case, row["cache"]], speeds.get((*case, stock_of(row["cache"])))
        step = row.get("median_step_seconds")
        shown = ["-" if step is None else f"{step * 1e3:.2f}", "-" if speed is None else f"{speed:.1f}"]
        shown.append(f"{speed / stock:.2f}x" if speed and stock else "-")
        peaks = [_gib(row.get(name)) for name in ("prompt_peak_bytes", "decode_peak_bytes", "kv_bytes")]
        lines.append([f"{case[0]} x {case[1]}", row["cache"], *shown, *peaks, row.get("reason", "")])
    header = ["batch x context", "cache", "median step ms", "tokens/s", "against stock", "prompt peak GiB"]
    return table([*header, "decode peak GiB", "KV GiB", "not run because"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny shape, on any machine; its figures mean nothing")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=32, help="timed decode steps of each case; fewer where slow")
    parser.add_argument("--cases", nargs="+", help="batchxcontext, such as 1x4096 8x32768")
    parser.add_argument(
        "--modes", nargs="+", choices=MODES, default=list(MODES), help="how steps are run; default: all"
    )
    parser.add_argument("--backend", default="inductor", help="of torch.compile, where no CUDA graph is recorded")
    parser.add_argument("--json", type=Path, help="default: results/transformers_decode.json; none with --quick")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type != "cuda" and not arguments.quick:
        raise SystemExit("no CUDA device: these figures are of a GPU; --quick tries the script on a CPU")
    cases = QUICK_CASES if arguments.quick else CASES
    if arguments.cases:
        cases = tuple((int(batch), int(context)) for batch, context in (c.split("x") for c in arguments.cases))
    torch.manual_seed(0)
    target = arguments.json or (None if arguments.quick else HERE / "results" / "transformers_decode.json")
    shape = QUICK_SHAPE if arguments.quick else SHAPE
    model = random_model(shape, device)

    def write(rows: list[dict[str, Any]]) -> None:
        if target is not None:
            write_json(target, {"shape": shape, "rows": rows, "targets": targets(rows)}, arguments.device)

    def one(contender: Contender, prompt: Tensor) -> dict[str, Any]:
        return attempt(model, contender, prompt, arguments.steps, arguments.backend)

    rows = compare(model, cases, tuple(arguments.modes), one, write)
    print("\n" + decode_table(rows))
    header = ["target", "batch x context", "cache", "at least", "found", "met"]
    print("\n" + table(header, [list(row.values()) for row in targets(rows)]))


if __name__ == "__main__":
    main()
