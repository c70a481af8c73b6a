"""Needle prompts through packed caches: exact-match accuracy by length and bits.

PROMPTS is a gzipped JSON list of rows with `length`, `prompt_ids` and `answer_ids`. A prompt goes into the cache in
chunks, so that all but the first is read by attention over packed pages; the answer counts when greedy decoding yields
exactly its ids, which is the case when every id is the most likely one after those before it. Intervals are Wilson's of
the share of right answers, 95 %; `lost` and `won` count prompts that only full precision, or only the cache, answers.
`bits` are all bytes of the filled cache, windows and scales included, over all coordinates.

    python benchmarks/retrieval.py MODEL PROMPTS --bits 4 3,2 --variants defaults windows --windows 4,16 4,64
    python benchmarks/retrieval.py MODEL PROMPTS --preset preset.json

A width is that of keys and values, or KEYS,VALUES; `--preset` takes a file of `turboquant doctor`, which decides the
bits of every layer, the windows and the centres, so that the recommended cache is what is measured.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from report import digest, table, write_json
from retrieval_caches import BITS, VARIANTS, MakeCache, caches, width, window
from torch import Tensor
from transformers import AutoModelForCausalLM

from turboquant_core.preset import PresetError
from turboquant_hf import QualityWarning, TurboQuantCache
from turboquant_hf.compat import CACHE_ARGUMENT
from turboquant_hf.memory import CacheMemory

HERE = Path(__file__).resolve().parent
TINY = HERE.parent / "examples" / "models" / "tiny"
Z95 = 1.959964
COLUMNS = ("cache", "tokens", "right", "95 % interval", "lost", "won")


def interval(right: int, prompts: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    share, z2 = right / prompts, Z95**2
    middle, half = share + z2 / (2 * prompts), Z95 * (share * (1 - share) / prompts + z2 / (4 * prompts**2)) ** 0.5
    return (middle - half) / (1 + z2 / prompts), (middle + half) / (1 + z2 / prompts)


def true_bits(cache: Any) -> float:
    """All bytes of a filled cache over all coordinates of the keys and values that it holds."""
    memory = cache.memory() if isinstance(cache, TurboQuantCache) else CacheMemory.of(cache.layers)
    return 8 * torch.bfloat16.itemsize * memory.stored / memory.bf16


def figures(
    right: list[bool], full: list[bool], bits: float | None = None, depths: Sequence[float] = ()
) -> dict[str, Any]:
    """Of one cache at one length, beside full precision on the same prompts; ``bits`` are true ones.

    ``depths`` say of each prompt how far into the text its needle stands, 0 to 1.
    """
    pairs = list(zip(right, full, strict=True))
    return {
        "prompts": len(right),
        "right": sum(right),
        "interval": interval(sum(right), len(right)),
        "lost": sum(theirs and not mine for mine, theirs in pairs),
        "won": sum(mine and not theirs for mine, theirs in pairs),
        "bits": bits,
        "right_by_depth": {
            f"{depth:g}": sum(mine for mine, own in zip(right, depths, strict=True) if own == depth)
            for depth in sorted(set(depths))
        },
    }


@torch.inference_mode()
def answers(model: Any, cache: Any, prompts: Tensor, expected: Tensor, chunk: int) -> list[bool]:
    """Whether greedy decoding after each row of ``prompts`` ``[batch, n]`` yields its answer in ``expected``."""
    *chunks, last = prompts.split(chunk, dim=1)
    for part in chunks:
        model(part, **{CACHE_ARGUMENT: cache}, logits_to_keep=1)
    ids = torch.cat((last, expected[:, :-1]), dim=1)
    logits = model(ids, **{CACHE_ARGUMENT: cache}, logits_to_keep=expected.shape[1]).logits
    found: list[bool] = (logits.argmax(-1) == expected).all(-1).tolist()
    return found


def chosen(rows: list[dict[str, Any]], lengths: list[int] | None, each: int) -> list[dict[str, Any]]:
    """``each`` rows of every length, spread evenly over depths and distractors."""
    by_length: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: (row["depth"], row["distractors"])):
        by_length[row["length"]].append(row)
    picked = []
    for length, group in sorted(by_length.items()):
        if lengths is None or length in lengths:
            count = min(each, len(group))
            picked += [group[i * len(group) // count] for i in range(count)]
    return picked


def batches(rows: list[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    """``rows`` in groups of at most ``size`` whose prompts and answers are equally long."""
    alike: dict[tuple[int, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        alike[row["length"], len(row["prompt_ids"]), len(row["answer_ids"])].append(row)
    for group in alike.values():
        yield from (group[i : i + size] for i in range(0, len(group), size))


@dataclass
class Found:
    """Of one length: right or wrong and the needle's depth for every row, and the true bits of the last cache."""

    right: list[bool] = field(default_factory=list)
    depths: list[float] = field(default_factory=list)
    bits: float | None = None


def measure(model: Any, rows: list[dict[str, Any]], make: MakeCache, chunk: int, batch: int) -> dict[int, Found]:
    """What a cache answers, by length."""
    found: dict[int, Found] = defaultdict(Found)
    for group in batches(rows, batch):
        prompts, expected = (
            torch.tensor([row[name] for row in group], device=model.device) for name in ("prompt_ids", "answer_ids")
        )
        cache, own = make(model), found[group[0]["length"]]
        own.right += answers(model, cache, prompts, expected, chunk)
        own.depths += [row["depth"] for row in group]
        own.bits = true_bits(cache)
    return found


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The command line, or ``words`` in its place."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--bits", type=width, nargs="*", help="4, or 3,2 (default: 4 3 2; none with --preset)")
    parser.add_argument("--lengths", type=int, nargs="+", help="default: all that the file has")
    parser.add_argument("--each", type=int, default=50, help="prompts of each length")
    parser.add_argument("--chunk", type=int, default=256, help="tokens of a prompt that go in at once")
    parser.add_argument("--batch", type=int, default=1, help="prompts that share a cache, and with it a centre")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--windows", type=window, nargs="+", default=[(4, 16)], help="SINKS,RECENT of that variant")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["defaults", "windows"])
    parser.add_argument("--preset", type=Path, nargs="+", default=[], help="files of `turboquant doctor`")
    parser.add_argument("--seed", type=int, default=42, help="of the rotation")
    parser.add_argument("--json", type=Path, help="default: results/quality_retrieval_MODEL.json")
    arguments = parser.parse_args(words)
    if arguments.bits is None:
        arguments.bits = [] if arguments.preset else BITS
    return arguments


def chosen_prompts(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows that are asked."""
    rows = json.loads(gzip.decompress(arguments.prompts.read_bytes()))
    return chosen(rows, arguments.lengths, arguments.each)


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What a reader needs to ask the same again."""
    return {
        "model": arguments.model.resolve().name,
        "model_sha256": digest(arguments.model / "model.safetensors"),
        "prompts_sha256": digest(arguments.prompts),
        "presets_sha256": {path.name: digest(path) for path in arguments.preset},
        "seed": arguments.seed,
        "dtype": "bfloat16",
        "chunk": arguments.chunk,
        "batch": arguments.batch,
        "caches": {},
    }


def main() -> None:
    arguments = parse()
    warnings.simplefilter("ignore", QualityWarning)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16, local_files_only=True)
    model = model.eval().to(arguments.device)
    rows, results = chosen_prompts(arguments), settings(arguments)
    if not rows:
        raise SystemExit(f"{arguments.prompts} has no prompts of --lengths {arguments.lengths}")
    target = arguments.json or HERE / "results" / f"quality_retrieval_{results['model']}.json"
    full: dict[int, Found] = {}
    try:
        makers = caches(arguments.bits, arguments.windows, arguments.variants, arguments.preset, arguments.seed)
    except PresetError as error:
        raise SystemExit(str(error)) from error
    for name, make in makers.items():
        start = time.perf_counter()
        found = measure(model, rows, make, arguments.chunk, arguments.batch)
        full = full or found
        results["caches"][name] = {
            str(n): figures(own.right, full[n].right, own.bits, own.depths) for n, own in found.items()
        }
        write_json(target, results, arguments.device)
        print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    print(table(columns(results["caches"]), shares(results["caches"])))


def has_bits(caches: dict[str, dict[str, dict[str, Any]]]) -> bool:
    """Whether true bits were recorded: files written before they were have none."""
    return all(found.get("bits") is not None for by_length in caches.values() for found in by_length.values())


def columns(caches: dict[str, dict[str, dict[str, Any]]]) -> tuple[str, ...]:
    """Header of :func:`shares`."""
    return (*COLUMNS[:1], "bits", *COLUMNS[1:]) if has_bits(caches) else COLUMNS


def shares(caches: dict[str, dict[str, dict[str, Any]]]) -> list[list[Any]]:
    """Rows of :func:`columns`."""
    rows, with_bits = [], has_bits(caches)
    for name, by_length in caches.items():
        for length, found in by_length.items():
            low, high = found["interval"]
            share = f"{found['right']} / {found['prompts']}"
            bits = [found["bits"]] if with_bits else []
            rows.append([name, *bits, length, share, f"{low:.3f} to {high:.3f}", found["lost"], found["won"]])
    return rows


if __name__ == "__main__":
    main()
