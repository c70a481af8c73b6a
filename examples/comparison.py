"""Run one model over several caches and measure what changes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from turboquant_core import MemoryFigures
from turboquant_hf import TurboQuantCache, patch_model, unpatch_model
from turboquant_hf.compat import CACHE_ARGUMENT
from turboquant_hf.summary import dense_memory

BITS = (None, 4, 3, 2)
"""None is the ordinary cache."""
CHUNK = 16
CONTEXTS = 6


@dataclass(frozen=True)
class Sample:
    """What every cache gets.

    Attributes:
        prompt: token ids ``[1, context]``.
        following: token ids ``[1, n]`` of the text after the prompt, scored.
        new_tokens: how many to generate.
    """

    prompt: Tensor
    following: Tensor
    new_tokens: int

    @classmethod
    def take(cls, tokenizer: Any, text: str, context: int, score: int, new_tokens: int) -> Sample:
        """Cut a sample from the start of ``text``."""
        ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=context + score).input_ids
        if ids.shape[1] < context + score:
            raise SystemExit(
                f"the text has {ids.shape[1]} tokens; --context {context} and --score {score} need {context + score}"
            )
        return cls(ids[:, :context], ids[:, context:], new_tokens)

    @property
    def steps(self) -> int:
        """Forward passes of one cache after its prompt."""
        return -(-self.following.shape[1] // CHUNK) + self.new_tokens


@dataclass(frozen=True)
class Result:
    """Figures of one cache.

    Attributes:
        bits: of the cache; None for the ordinary one.
        text: what it generated.
        generated: tokens of it.
        shared_tokens: generated tokens before the first that differs from the ordinary cache's.
        stored: bytes of keys and values, scales included.
        compression: against 16 bits a coordinate.
        kl_divergence: mean over scored tokens, nats, from the ordinary cache.
        same_top: share of scored tokens whose most likely next token is that of the ordinary cache.
        tokens_per_second: of the median step of generation, prompt not included.
    """

    bits: int | None
    text: str
    generated: int
    shared_tokens: int
    stored: int
    compression: float
    kl_divergence: float
    same_top: float
    tokens_per_second: float


def load_model(folder: Path) -> tuple[Any, Any]:
    """Model in bfloat16, as trained, and tokenizer; nothing is downloaded."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, local_files_only=True)
    return model.eval(), tokenizer


def make_cache(model: Any, bits: int | None, verify: bool = False) -> Any:
    """An empty cache; patches or unpatches the model for it, and compares both on request."""
    if bits is None:
        unpatch_model(model)
        return DynamicCache(config=model.config)
    return patch_model(model, bits=bits, verify=verify)


def memory_of(cache: Any) -> MemoryFigures:
    """Bytes of a cache of either kind."""
    if isinstance(cache, TurboQuantCache):
        return cache.memory()
    size = sum(dense_memory(layer).stored for layer in cache.layers)
    return MemoryFigures(size, size, size)


@torch.inference_mode()
def score(model: Any, cache: Any, sample: Sample, advance: Callable[[int], Any]) -> Tensor:
    """Log-probabilities ``[n, vocabulary]`` of the following text, read chunk by chunk over the cache."""
    logits = [model(sample.prompt, **{CACHE_ARGUMENT: cache}, logits_to_keep=1).logits]
    for chunk in sample.following.split(CHUNK, dim=1):
        logits.append(model(chunk, **{CACHE_ARGUMENT: cache}).logits)
        advance(1)
    return torch.cat(logits, dim=1)[0, :-1].float().log_softmax(-1)


@torch.inference_mode()
def generate(model: Any, cache: Any, sample: Sample, advance: Callable[[int], Any]) -> tuple[Tensor, float]:
    """Greedy token ids ``[new_tokens]`` after the prompt, and tokens per second of the median step."""
    token = model(sample.prompt, **{CACHE_ARGUMENT: cache}, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
    tokens, seconds = [token], []
    for _ in range(sample.new_tokens - 1):
        start = time.perf_counter()
        token = model(token, **{CACHE_ARGUMENT: cache}).logits[:, -1].argmax(-1, keepdim=True)
        seconds.append(time.perf_counter() - start)
        tokens.append(token)
        advance(1)
    advance(1)
    # Not the mean: one step in which the machine did something else would decide it.
    return torch.cat(tokens, dim=1)[0], 1 / median(seconds)


def _shared(tokens: Tensor, reference: Tensor) -> int:
    differs = (tokens != reference).nonzero()
    return int(differs[0]) if len(differs) else len(tokens)


def compare(model: Any, tokenizer: Any, sample: Sample, advance: Callable[[int], Any]) -> list[Result]:
    """Figures of every cache of :data:`BITS`; the first is the reference of the others."""
    results, reference_scores, reference_tokens = [], None, None
    for bits in BITS:
        scores = score(model, make_cache(model, bits, verify=True), sample, advance)
        cache = make_cache(model, bits)
        tokens, speed = generate(model, cache, sample, advance)
        if reference_scores is None or reference_tokens is None:
            reference_scores, reference_tokens = scores, tokens
        divergence = (reference_scores.exp() * (reference_scores - scores)).sum(-1).mean()
        memory = memory_of(cache)
        results.append(
            Result(
                bits=bits,
                text=tokenizer.decode(tokens),
                generated=len(tokens),
                shared_tokens=_shared(tokens, reference_tokens),
                stored=memory.stored,
                compression=memory.compression_ratio,
                kl_divergence=float(divergence),
                same_top=float((scores.argmax(-1) == reference_scores.argmax(-1)).float().mean()),
                tokens_per_second=speed,
            )
        )
    return results


@torch.inference_mode()
def memory_by_context(model: Any, prompt: Tensor) -> dict[int | None, list[tuple[int, int]]]:
    """Measured (tokens, bytes) of each cache as it takes the prompt piece by piece."""
    series: dict[int | None, list[tuple[int, int]]] = {}
    for bits in BITS:
        series[bits], context, cache = [], 0, make_cache(model, bits)
        for piece in prompt.chunk(CONTEXTS, dim=1):
            model(piece, **{CACHE_ARGUMENT: cache}, logits_to_keep=1)
            context += piece.shape[1]
            series[bits].append((context, memory_of(cache).stored))
    unpatch_model(model)
    return series
