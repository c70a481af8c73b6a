"""Score a text while every attention reads keys and values that went through a codec.

A forward whose attention sees, for each query, the reconstructed keys and values of all tokens up to its own is what
decoding token by token through a cache computes, in one pass: a cache stores a token before it is attended to.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

NAME = "through_codec"
RAW_BITS = 16


class VectorCodec(Protocol):
    """Keys or values there and back."""

    def __call__(self, x: Tensor, layer: int) -> Tensor:
        """What is read after ``x`` float32 ``[batch, kv_heads, tokens, head_dim]`` of ``layer`` was stored."""

    def vector_bytes(self, head_dim: int, layer: int) -> float:
        """True bytes of one vector, scales included."""


@dataclass(frozen=True)
class Raw:
    """16 bits a coordinate."""

    def __call__(self, x: Tensor, layer: int) -> Tensor:
        return x

    def vector_bytes(self, head_dim: int, layer: int) -> float:
        return head_dim * RAW_BITS / 8


@dataclass(frozen=True)
class Method:
    """A way to keep a cache.

    Attributes:
        name: of the row.
        family: line of the plot that it belongs to; None draws nothing.
        key: codec of keys, after the position embedding.
        value: codec of values.
        sinks: first tokens that stay in full precision.
        recent: last tokens, the query's own included, that stay in full precision.
        prompt: first tokens whose own queries read everything in full precision, as in a cache's first call.
        page: tokens of a page that has rows for all sinks and recent tokens, as pages of vLLM do; 0 where a sequence
            keeps them once.
    """

    name: str
    key: VectorCodec
    value: VectorCodec
    family: str | None = None
    sinks: int = 0
    recent: int = 0
    prompt: int = 0
    page: int = 0

    def bits(self, head_dim: int, layers: int, context: int) -> float:
        """True bits per coordinate of keys and values at ``context`` tokens."""
        raw = min(self.sinks + self.recent, context)
        packed = sum(self.key.vector_bytes(head_dim, i) + self.value.vector_bytes(head_dim, i) for i in range(layers))
        exact = (raw * context / self.page if self.page else raw) * layers * 2 * head_dim * RAW_BITS / 8
        total = (context if self.page else context - raw) * packed + exact
        return total * 8 / (context * layers * 2 * head_dim)


FULL = Method("full precision", Raw(), Raw())


class Observer(Protocol):
    """Sees the queries, keys and values of every attention."""

    def __call__(self, module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Query ``[batch, q_heads, tokens, head_dim]``, key and value ``[batch, kv_heads, tokens, head_dim]``."""


class _Active:
    """What attention reads through and shows itself to, set for the duration of a forward."""

    method: Method = FULL
    observer: Observer | None = None


def _exact(method: Method, tokens: int, device: torch.device) -> Tensor:
    """Boolean ``[query, key]``: which keys a query reads in full precision."""
    position = torch.arange(tokens, device=device)
    query, key = position.unsqueeze(1), position.unsqueeze(0)
    return (key < method.sinks) | (query - key < method.recent) | (query < method.prompt)


def _windowed(query: Tensor, raw: list[Tensor], coded: list[Tensor], method: Method, scaling: float) -> Tensor:
    exact = _exact(method, query.shape[2], query.device)
    scores = torch.where(exact, query @ raw[0].mT, query @ coded[0].mT) * scaling
    weights = scores.masked_fill(torch.ones_like(exact).triu(1), -torch.inf).softmax(-1)
    return (weights * exact) @ raw[1] + (weights * ~exact) @ coded[1]


def _attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    method, layer, groups = _Active.method, module.layer_idx, query.shape[1] // key.shape[1]
    scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
    _check(module, mask, kwargs)
    if _Active.observer is not None:
        _Active.observer(module, query, key, value)
    raw = [x.repeat_interleave(groups, 1) for x in (key, value)]
    if method is FULL:
        out = F.scaled_dot_product_attention(query, *raw, is_causal=True, scale=scaling)
    else:
        pair = (method.key(key.float(), layer), method.value(value.float(), layer))
        coded = [x.to(key.dtype).repeat_interleave(groups, 1) for x in pair]
        if method.sinks or method.recent or method.prompt:
            out = _windowed(query, raw, coded, method, scaling)
        else:
            out = F.scaled_dot_product_attention(query, *coded, is_causal=True, scale=scaling)
    return out.transpose(1, 2), None


def _check(module: torch.nn.Module, mask: Tensor | None, kwargs: dict[str, Any]) -> None:
    set_ = [name for name in ("softcap", "s_aux", "sliding_window") if kwargs.get(name) is not None]
    if mask is not None or set_:
        raise SystemExit(
            f"{type(module).__name__} attends with {', '.join(set_) or 'a mask'}; this benchmark scores causal "
            "attention without padding, window, soft-cap and sinks only"
        )


def prepare(model: Any) -> None:
    """Let ``model`` attend through the method of :func:`through`."""
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


@contextmanager
def through(method: Method, observer: Observer | None = None) -> Iterator[None]:
    """Forwards inside the block read keys and values through ``method``."""
    _Active.method, _Active.observer = method, observer
    try:
        yield
    finally:
        _Active.method, _Active.observer = FULL, None


@torch.inference_mode()
def log_probabilities(model: Any, ids: Tensor, method: Method, observer: Observer | None = None) -> Tensor:
    """Of every next token: float32 ``[batch, tokens, vocabulary]`` for ids ``[batch, tokens]``."""
    with through(method, observer):
        return model(ids.to(model.device), use_cache=False).logits.float().log_softmax(-1)


@dataclass
class Sums:
    """Running sums of one method over scored tokens."""

    kl: float = 0.0
    loss: float = 0.0
    same_top: float = 0.0
    tokens: int = 0
    by_window: list[float] = field(default_factory=list)

    def add(self, reference: Tensor, found: Tensor, targets: Tensor) -> None:
        """Add the predictions of ``targets`` ``[batch, n]`` by ``[batch, n, vocabulary]`` log-probabilities."""
        kl = (reference.exp() * (reference - found)).sum(-1)
        self.kl += float(kl.double().sum())
        self.by_window += kl.mean(-1).tolist()
        self.loss -= float(found.gather(-1, targets.unsqueeze(-1)).double().sum())
        self.same_top += float((found.argmax(-1) == reference.argmax(-1)).sum())
        self.tokens += targets.numel()


def windows(ids: Tensor, context: int) -> list[Tensor]:
    """``ids`` ``[n]`` in rows of ``context`` tokens that do not overlap; a rest shorter than that is dropped."""
    if len(ids) < context:
        raise SystemExit(f"the text has {len(ids)} tokens, fewer than --context {context}")
    return list(ids[: len(ids) // context * context].view(-1, context))


def score(
    model: Any,
    rows: list[Tensor],
    methods: Sequence[Method],
    batch: int = 2,
    given: Mapping[str, Tensor] | None = None,
) -> dict[str, Sums]:
    """Sums of every method, full precision first, over the same windows; each reference is computed once.

    ``given`` are log-probabilities ``[rows, tokens - 1, vocabulary]`` that something else computed for the same rows.
    """
    found = given or {}
    sums = {name: Sums() for name in (FULL.name, *(method.name for method in methods), *found)}
    for start in range(0, len(rows), batch):
        print(f"{len(methods)} methods, window {start} of {len(rows)}", file=sys.stderr, flush=True)
        ids = torch.stack(rows[start : start + batch]).to(model.device)
        reference = log_probabilities(model, ids, FULL)[:, :-1]
        sums[FULL.name].add(reference, reference, ids[:, 1:])
        for method in methods:
            sums[method.name].add(reference, log_probabilities(model, ids, method)[:, :-1], ids[:, 1:])
        for name, log_probs in found.items():
            sums[name].add(reference, log_probs[start : start + batch].to(model.device), ids[:, 1:])
    return sums
