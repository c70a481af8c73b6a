"""The ways of generating that a packed cache must not change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from turboquant_hf.compat import CACHE_ARGUMENT

PROMPT_TOKENS = 14
NEW_TOKENS = 5
CHUNK_TOKENS = 5
MORE_TOKENS = 4
TOLERANCE = 5e-4
"""Largest difference of logits, relative to their root mean square: float32 sums in another order, nothing else."""


class Generated(NamedTuple):
    """Tokens ``[batch, length]`` and the logits ``[new tokens, batch, vocabulary]`` that led to them."""

    tokens: Tensor
    logits: Tensor

    def difference(self, other: Generated) -> float:
        """Largest difference of logits relative to their root mean square; infinite for other tokens."""
        if not torch.equal(self.tokens, other.tokens):
            return float("inf")
        worst = float((self.logits - other.logits).abs().max())
        return worst / max(float(self.logits.square().mean().sqrt()), 1e-6)


def _random(shape: tuple[int, int], vocabulary: int, seed: int) -> Tensor:
    return torch.randint(2, vocabulary, shape, generator=torch.Generator().manual_seed(seed))


def vocabulary_of(model: Any) -> int:
    """Token ids that a prompt may use."""
    return min(int(model.config.get_text_config(decoder=True).vocab_size), 100)


def run(model: Any, ids: Tensor, cache: Any, mask: Tensor | None = None, **options: Any) -> Generated:
    """Greedy generation over ``cache``; None lets Transformers make its own."""
    if cache is not None:
        options[CACHE_ARGUMENT] = cache
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids) if mask is None else mask,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    return Generated(out.sequences, torch.stack(out.logits).float())


def greedy(model: Any, cache: Any) -> Generated:
    """One prompt."""
    return run(model, _random((1, PROMPT_TOKENS), vocabulary_of(model), 3), cache)


def padded(model: Any, cache: Any) -> Generated:
    """A left-padded batch of three."""
    ids = _random((3, PROMPT_TOKENS), vocabulary_of(model), 5)
    mask = torch.ones_like(ids)
    mask[1, :6], mask[2, :1] = 0, 0
    return run(model, ids * mask, cache, mask)


def chunked(model: Any, cache: Any) -> Generated:
    """A prompt in chunks, so that several queries attend to a packed past."""
    return run(model, _random((1, PROMPT_TOKENS), vocabulary_of(model), 7), cache, prefill_chunk_size=CHUNK_TOKENS)


def turns(model: Any, cache: Any) -> Generated:
    """A second prompt that continues the first one's answer on the same cache."""
    first = greedy(model, cache)
    more = _random((1, MORE_TOKENS), vocabulary_of(model), 9)
    return run(model, torch.cat((first.tokens, more), 1), cache)


MODES: dict[str, Callable[[Any, Any], Generated]] = {
    "greedy": greedy,
    "padded": padded,
    "chunked": chunked,
    "turns": turns,
}
