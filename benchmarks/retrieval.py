"""Needle prompts through packed caches: exact-match accuracy by length and bits.

PROMPTS is a gzipped JSON list of rows with `length`, `prompt_ids` and `answer_ids`. A prompt goes into the cache in
chunks, so that all but the first is read by attention over packed pages; the answer counts when greedy decoding yields
exactly its ids, which is the case when every id is the most likely one after those before it. Intervals are Wilson's of
the share of right answers, 95 %; `lost` and `won` count prompts that only full precision, or only the cache, answers.
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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from report import table, write_json
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from turboquant_hf import QualityWarning, patch_model, unpatch_model
from turboquant_hf.compat import CACHE_ARGUMENT

HERE = Path(__file__).resolve().parent
TINY = HERE.parent / "examples" / "models" / "tiny"
FULL = "full precision"
VARIANTS = ("defaults", "packed alone", "windows", "shaped")
Z95 = 1.959964
COLUMNS = ("cache", "tokens", "right", "95 % interval", "lost", "won")

MakeCache = Callable[[Any], Any]


def stock_cache(model: Any) -> DynamicCache:
    """Full precision: the reference of every share."""
    unpatch_model(model)
    return DynamicCache(config=model.config)


def packed(bits: float, **options: Any) -> MakeCache:
    """Makes packed caches; what verification would say is what this benchmark measures."""
    return lambda model: patch_model(model, bits, verify=False, **options)


def caches(bits: list[float], sinks: int, recent: int, variants: list[str]) -> dict[str, MakeCache]:
    """Full precision, then each width in each of the ``variants``."""
    options: dict[str, dict[str, Any]] = {
        "defaults": {},
        "packed alone": {"recent_tokens": 0, "center_keys": False},
        "windows": {"sink_tokens": sinks, "recent_tokens": recent, "center_keys": True},
        "shaped": {"shaped": True},
    }
    names = {"defaults": "", "windows": f", centred keys, windows {sinks} + {recent}"}
    found: dict[str, MakeCache] = {FULL: stock_cache}
    for width in bits:
        for variant in variants:
            found[f"{width:g} bit{names.get(variant, f', {variant}')}"] = packed(width, **options[variant])
    return found


def interval(right: int, prompts: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    share, z2 = right / prompts, Z95**2
    middle, half = share + z2 / (2 * prompts), Z95 * (share * (1 - share) / prompts + z2 / (4 * prompts**2)) ** 0.5
    return (middle - half) / (1 + z2 / prompts), (middle + half) / (1 + z2 / prompts)


def figures(right: list[bool], full: list[bool]) -> dict[str, Any]:
    """Of one cache at one length, beside full precision on the same prompts."""
    pairs = list(zip(right, full, strict=True))
    return {
        "prompts": len(right),
        "right": sum(right),
        "interval": interval(sum(right), len(right)),
        "lost": sum(theirs and not mine for mine, theirs in pairs),
        "won": sum(mine and not theirs for mine, theirs in pairs),
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


def measure(model: Any, rows: list[dict[str, Any]], make: MakeCache, chunk: int, batch: int) -> dict[int, list[bool]]:
    """Right or wrong for every row, by length."""
    found: dict[int, list[bool]] = defaultdict(list)
    for group in batches(rows, batch):
        prompts, expected = (
            torch.tensor([row[name] for row in group], device=model.device) for name in ("prompt_ids", "answer_ids")
        )
        found[group[0]["length"]] += answers(model, make(model), prompts, expected, chunk)
    return found


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--bits", type=float, nargs="+", default=[4, 3, 2])
    parser.add_argument("--lengths", type=int, nargs="+", help="default: all that the file has")
    parser.add_argument("--each", type=int, default=50, help="prompts of each length")
    parser.add_argument("--chunk", type=int, default=256, help="tokens of a prompt that go in at once")
    parser.add_argument("--batch", type=int, default=1, help="prompts that share a cache, and with it a centre")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--recent", type=int, default=16)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["defaults", "windows"])
    parser.add_argument("--json", type=Path, help="default: results/quality_retrieval_MODEL.json")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    warnings.simplefilter("ignore", QualityWarning)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16, local_files_only=True)
    model = model.eval().to(arguments.device)
    rows = chosen(json.loads(gzip.decompress(arguments.prompts.read_bytes())), arguments.lengths, arguments.each)
    results: dict[str, Any] = {
        "model": arguments.model.resolve().name,
        "chunk": arguments.chunk,
        "batch": arguments.batch,
        "caches": {},
    }
    target = arguments.json or HERE / "results" / f"quality_retrieval_{results['model']}.json"
    full: dict[int, list[bool]] = {}
    for name, make in caches(arguments.bits, arguments.sinks, arguments.recent, arguments.variants).items():
        start = time.perf_counter()
        found = measure(model, rows, make, arguments.chunk, arguments.batch)
        full = full or found
        results["caches"][name] = {str(n): figures(right, full[n]) for n, right in found.items()}
        write_json(target, results, arguments.device)
        print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    print(table(COLUMNS, shares(results["caches"])))


def shares(caches: dict[str, dict[str, dict[str, Any]]]) -> list[list[Any]]:
    """Rows of :data:`COLUMNS`."""
    rows = []
    for name, by_length in caches.items():
        for length, found in by_length.items():
            low, high = found["interval"]
            share = f"{found['right']} / {found['prompts']}"
            rows.append([name, length, share, f"{low:.3f} to {high:.3f}", found["lost"], found["won"]])
    return rows


if __name__ == "__main__":
    main()
