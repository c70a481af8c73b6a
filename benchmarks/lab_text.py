"""Greedy text over packed caches against full precision, token by token.

Each prompt is a piece of TEXT. Full precision writes greedily; a packed cache then reads the same prompt and the same
written tokens, one at a time. Reported are two senses of equal: the share of steps whose most likely token is the one
that full precision wrote (the tokens before it being the same), and how many tokens a free run would write before its
first difference, which is where the first of these steps fails.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from statistics import mean
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from report import table, write_json
from retrieval import stock_cache
from transformers import AutoModelForCausalLM, AutoTokenizer

from turboquant_hf import patch_model
from turboquant_hf.compat import CACHE_ARGUMENT

HERE = Path(__file__).resolve().parent


def prompts(tokenizer: Any, text: str, count: int, length: int) -> list[torch.Tensor]:
    """``count`` pieces of ``length`` tokens each, ``[1, length]``, spread evenly over the text."""
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[0]
    starts = torch.linspace(0, len(ids) - length, count).long().tolist()
    return [ids[start : start + length].unsqueeze(0) for start in starts]


def next_token(model: Any, ids: torch.Tensor, cache: Any) -> int:
    """The most likely token after ``ids`` and what the cache holds."""
    return int(model(ids, **{CACHE_ARGUMENT: cache}, logits_to_keep=1).logits[0, -1].argmax())


@torch.inference_mode()
def write(model: Any, prompt: torch.Tensor, tokens: int) -> list[int]:
    """Greedy tokens of full precision."""
    cache = stock_cache(model)
    written = [next_token(model, prompt, cache)]
    while len(written) < tokens:
        written.append(next_token(model, torch.tensor([[written[-1]]]), cache))
    return written


@torch.inference_mode()
def agreement(model: Any, cache: Any, prompt: torch.Tensor, written: list[int]) -> list[bool]:
    """Whether each written token is the packed cache's choice too, after the written tokens before it."""
    inputs = [prompt, *(torch.tensor([[token]]) for token in written[:-1])]
    return [next_token(model, ids, cache) == token for ids, token in zip(inputs, written, strict=True)]


def figures(steps: list[list[bool]]) -> dict[str, Any]:
    """Both senses of equal, over prompts."""
    prefixes = [row.index(False) if False in row else len(row) for row in steps]
    return {
        "prompts": len(steps),
        "tokens": sum(map(len, steps)),
        "same_top": sum(map(sum, steps)) / sum(map(len, steps)),
        "identical_texts": sum(all(row) for row in steps),
        "mean_equal_prefix": mean(prefixes),
        "shortest_equal_prefix": min(prefixes),
    }


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
    parser.add_argument("--json", type=Path, help="default: results/text_MODEL.json")
    return parser.parse_args()


def main() -> None:
    """Measure and report."""
    arguments = parse()
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32, local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, local_files_only=True)
    pieces = prompts(tokenizer, arguments.text.read_text(encoding="utf-8"), arguments.prompts, arguments.length)
    texts = [write(model, piece, arguments.tokens) for piece in pieces]
    windows = {"sink_tokens": arguments.sinks, "recent_tokens": arguments.recent}
    results: dict[str, Any] = {"model": arguments.model.resolve().name, "dtype": "float32", "caches": {}}
    for bits in arguments.bits:
        for name, options in {
            f"{bits:g} bit": {},
            f"{bits:g} bit, windows {arguments.sinks} + {arguments.recent}": windows,
        }.items():
            start = time.perf_counter()
            steps = [
                agreement(model, patch_model(model, bits, verify=False, **options), piece, text)
                for piece, text in zip(pieces, texts, strict=True)
            ]
            results["caches"][name] = figures(steps)
            print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
            write_json(arguments.json or HERE / "results" / f"text_{results['model']}.json", results)
    columns = list(next(iter(results["caches"].values())))
    print(table(["cache", *columns], [[name, *row.values()] for name, row in results["caches"].items()]))


if __name__ == "__main__":
    main()
