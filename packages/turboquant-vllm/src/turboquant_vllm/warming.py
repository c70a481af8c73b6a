"""Let every kernel that steps of an engine launch be compiled before it serves: no request waits for a compiler.

CUDA graphs are captured for decoding rows of some batch sizes only. Other batches, prompts that continue after a packed
context and large stores launch the same kernels in other forms.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .batch_sizes import sizes
from .kernels import outside_pools
from .plan import PREFIX_TOKENS, prompt_plan
from .step import PackedRows, StepMetadata

if TYPE_CHECKING:
    from .impl import PackedAttention

logger = logging.getLogger("vllm.turboquant")

_warm: set[Hashable] = set()


@dataclass(frozen=True, slots=True)
class Extent:
    """The largest steps of an engine.

    Attributes:
        rows: sequences of a step.
        tokens: of a step.
        query: new tokens of a decoding row, drafts included.
        context: tokens of a packed context that are decoded at a time.
    """

    rows: int
    tokens: int
    query: int
    context: int

    @classmethod
    def of(cls, vllm_config: Any, query: int) -> Extent:
        """Those of an engine whose decoding rows have up to ``query`` new tokens."""
        scheduler = vllm_config.scheduler_config
        context = min(vllm_config.model_config.max_model_len, PREFIX_TOKENS)
        return cls(scheduler.max_num_seqs, scheduler.max_num_batched_tokens, query, context)


def warm_up(layers: list[PackedAttention], vllm_config: Any, query: int, page_size: int, device: torch.device) -> None:
    """Run each kind of layer once in every form over a page of its own, which holds zeros.

    Nothing is done where kernels are not compiled: on a CPU.

    Args:
        layers: of an engine, with codecs of pages of ``page_size`` tokens.
        vllm_config: of the engine.
        query: most new tokens of a decoding row.
        page_size: tokens of a page.
        device: where the engine runs.
    """
    if device.type != "cuda":
        return
    extent = Extent.of(vllm_config, query)
    kinds = {(layer.kind(page_size), extent): layer for layer in layers}
    cold = {kind: layer for kind, layer in kinds.items() if kind not in _warm}
    if not cold:
        return
    began = time.perf_counter()
    for layer in cold.values():
        outside_pools(device, partial(run_forms, layer, extent, page_size, device))
    _warm.update(cold)
    logger.info("FUSED_TURBOQUANT: kernels are compiled, %.1f s", time.perf_counter() - began)


@torch.inference_mode()
def run_forms(layer: PackedAttention, extent: Extent, page_size: int, device: torch.device) -> None:
    """Every form of one layer's kernels, of sequences without tokens where the form allows it."""
    pages = _pages(layer, page_size, device)
    for tokens in (1, extent.tokens):
        key, value = _vectors(layer, layer.num_kv_heads, tokens, device)
        layer.do_kv_cache_update(None, key, value, pages, _no_slots(tokens, device))
    for step in (*decoding_steps(extent, device), *prompt_steps(extent, page_size, device)):
        tokens = step.slot_mapping.shape[0]
        key, value = _vectors(layer, layer.num_kv_heads, tokens, device)
        query, output = (x.contiguous() for x in _vectors(layer, layer.num_heads, tokens, device))
        layer.forward(None, query, key, value, pages, step, output)
    if device.type == "cuda":
        torch.accelerator.synchronize(device)


def decoding_steps(extent: Extent, device: torch.device) -> Iterator[StepMetadata]:
    """Rows of equal and of unequal numbers of tokens, in batches of every size that kernels tell apart."""
    for rows in sizes(extent.rows):
        table, lengths = _zeros((rows, 1), device), _zeros((rows,), device)
        for query in range(1, extent.query + 1):
            tokens = rows * query
            packed = PackedRows(tokens, table, lengths, None)
            yield StepMetadata(packed, None, _no_slots(tokens, device))
    for tokens in sizes(extent.rows * extent.query):
        starts = torch.tensor([0, tokens], dtype=torch.int32, device=device)
        packed = PackedRows(tokens, _zeros((1, 1), device), _zeros((1,), device), starts)
        yield StepMetadata(packed, None, _no_slots(tokens, device))


def prompt_steps(extent: Extent, page_size: int, device: torch.device) -> Iterator[StepMetadata]:
    """One new token after a short and after a long packed context."""
    for context in (1, extent.context):
        table = _zeros((1, -(-(context + 1) // page_size)), device)
        yield StepMetadata(None, prompt_plan([0, 1], [context + 1], table, 0), _no_slots(1, device))


def _pages(layer: PackedAttention, page_size: int, device: torch.device) -> Tensor:
    shape = (1, layer.num_kv_heads, page_size, layer.setup.token_bytes)
    return torch.zeros(shape, dtype=torch.uint8, device=device)


def _vectors(layer: PackedAttention, heads: int, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Zeros ``[tokens, heads, head_dim]``, which take the memory of one token."""
    zeros = torch.zeros((1, heads, layer.head_size), dtype=layer.setup.request.dtype, device=device)
    return zeros.expand(tokens, -1, -1), zeros.clone().expand(tokens, -1, -1)


def _zeros(shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.zeros(shape, dtype=torch.int32, device=device)


def _no_slots(tokens: int, device: torch.device) -> Tensor:
    return torch.full((tokens,), -1, dtype=torch.int64, device=device)
