"""Greedy text over packed caches against full precision, token by token.

Each prompt is a piece of TEXT. Full precision writes greedily; a packed cache then reads the same prompt and the same
written tokens, one at a time, and at last writes by itself. Reported are three senses of equal: the share of steps
whose most likely token is the one that full precision wrote (the tokens before it being the same), how many tokens a
free run writes before its first difference, and the share of equal tokens in equal places of a free run, where a text
that has taken another turn agrees by chance only.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from report import table, write_json
from retrieval_caches import stock_cache
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from turboquant_hf import patch_model
from turboquant_hf.compat import CACHE_ARGUMENT

HERE = Path(__file__).resolve().parent


def pieces(tokenizer: Any, text: str, count: int, length: int) -> Tensor:
    """``[count, length]`` token ids, spread evenly over the text."""
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    if len(ids) < length:
        raise SystemExit(f"the text has {len(ids)} tokens, fewer than --length {length}")
    starts = torch.linspace(0, len(ids) - length, count).long().tolist()
    return torch.stack([ids[start : start + length] for start in starts])


def next_tokens(model: Any, ids: Tensor, cache: Any) -> Tensor:
    """The most likely token of each row after ``ids`` ``[batch, n]`` and what the cache holds: ``[batch, 1]``."""
    return model(ids, **{CACHE_ARGUMENT: cache}, logits_to_keep=1).logits[:, -1:].argmax(-1)


@torch.inference_mode()
def write(model: Any, prompts: Tensor, tokens: int, cache: Any = None) -> Tensor:
    """Greedy tokens over an empty cache, else full precision: ``[batch, tokens]`` after prompts ``[batch, length]``."""
    cache = stock_cache(model) if cache is None else cache
    written = [next_tokens(model, prompts, cache)]
    while len(written) < tokens:
        written.append(next_tokens(model, written[-1], cache))
    return torch.cat(written, dim=1)


@torch.inference_mode()
def agreement(model: Any, cache: Any, prompts: Tensor, written: Tensor) -> Tensor:
    """Whether each written token is the packed cache's choice too, after the written tokens before it.

    The first of them is not: it comes from the prompt, which a cache's first call attends to in full precision.
    """
    next_tokens(model, prompts, cache)
    found = [next_tokens(model, ids, cache) for ids in written[:, :-1].split(1, dim=1)]
    return torch.cat(found, dim=1) == written[:, 1:]


def figures(equal: Tensor, free: Tensor) -> dict[str, Any]:
    """The senses of equal, of bool ``[prompts, steps]`` over the same text and in a free run."""
    prefixes = equal.long().cumprod(1).sum(1)
    return {
        "prompts": len(equal),
        "tokens": equal.numel(),
        "same_top": float(equal.double().mean()),
        "identical_texts": int(equal.all(1).sum()),
        "mean_equal_prefix": float(prefixes.double().mean()),
        "shortest_equal_prefix": int(prefixes.min()),
        "same_place_in_a_free_run": float(free.double().mean()),
    }


def compare(
    model: Any, options: dict[str, Any], prompts: tuple[Tensor, ...], texts: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Bool ``[prompts, steps]``: agreement over the texts that full precision wrote, and in a free run."""
    equal, free = [], []
    for group, written in zip(prompts, texts, strict=True):
        equal.append(agreement(model, patch_model(model, verify=False, **options), group, written))
        alone = write(model, group, written.shape[1], patch_model(model, verify=False, **options))
        free.append((alone == written)[:, 1:])
    return torch.cat(equal), torch.cat(free)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--bits", type=float, nargs="+", default=[4, 3])
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--length", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=48, help="tokens to write")
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--recent", type=int, default=16)
    parser.add_argument("--batch", type=int, default=20, help="prompts that share a cache")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="default: results/text_MODEL.json")
    return parser.parse_args()


def caches(bits: list[float], sinks: int, recent: int) -> dict[str, dict[str, Any]]:
    """Options of each cache: every width alone, and with full-precision windows."""
    windows = {"sink_tokens": sinks, "recent_tokens": recent}
    found: dict[str, dict[str, Any]] = {}
    for width in bits:
        found[f"{width:g} bit"] = {"bits": width}
        found[f"{width:g} bit, windows {sinks} + {recent}"] = {"bits": width, **windows}
    return found


def main() -> None:
    """Measure and report."""
    arguments = parse()
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32, local_files_only=True)
    model = model.eval().to(arguments.device)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, local_files_only=True)
    text = arguments.text.read_text(encoding="utf-8")
    prompts = pieces(tokenizer, text, arguments.prompts, arguments.length).to(model.device).split(arguments.batch)
    texts = [write(model, group, arguments.tokens) for group in prompts]
    results: dict[str, Any] = {"model": arguments.model.resolve().name, "dtype": "float32", "caches": {}}
    for name, options in caches(arguments.bits, arguments.sinks, arguments.recent).items():
        start = time.perf_counter()
        equal, free = compare(model, options, prompts, texts)
        results["caches"][name] = figures(equal, free)
        print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        write_json(arguments.json or HERE / "results" / f"text_{results['model']}.json", results, arguments.device)
    columns = list(next(iter(results["caches"].values())))
    print(table(["cache", *columns], [[name, *row.values()] for name, row in results["caches"].items()]))


if __name__ == "__main__":
    main()
