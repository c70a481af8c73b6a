"""A model called with tokens of its decoder alone: an encoder-decoder attends to made-up encoder states besides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from .compat import CACHE_ARGUMENT, Cache, PreTrainedModel
from .generation import for_model

ENCODED_TOKENS = 7
"""Odd, and fewer than a prompt: cross-attention that reads the wrong cache fails or differs."""

DecoderCall: TypeAlias = Callable[[Tensor, Tensor], Any]
"""Takes ids int64 ``[batch, tokens]`` and the mask int64 ``[batch, tokens so far]``; gives what the model does."""


def decoder_call(model: PreTrainedModel, cache: Cache, batch: int, device: torch.device) -> DecoderCall:
    """Calls of ``model`` with decoder tokens over ``cache``.

    Args:
        model: a decoder or an encoder-decoder. Its encoder is not run: what that takes (text, sound) is its own affair.
        cache: of the decoder's self-attention.
        batch: sequences.
        device: of the tokens.
    """
    arguments: dict[str, Any] = {CACHE_ARGUMENT: for_model(model, cache), "use_cache": True}
    if not model.config.is_encoder_decoder:
        return lambda ids, mask: model(
            input_ids=ids, attention_mask=mask, position_ids=_positions(ids, mask), **arguments
        )
    arguments["encoder_outputs"] = _encoded(model, batch, device)
    # Positions are the decoder's own affair: hardly one takes them.
    return lambda ids, mask: model(decoder_input_ids=ids, decoder_attention_mask=mask, **arguments)


def _positions(ids: Tensor, mask: Tensor) -> Tensor:
    """Counted from the first real token."""
    return (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]


def _encoded(model: PreTrainedModel, batch: int, device: torch.device) -> BaseModelOutput:
    width = getattr(model.get_encoder(), "config", model.config).hidden_size
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(batch, ENCODED_TOKENS, width, generator=generator)
    return BaseModelOutput(last_hidden_state=states.to(device, model.dtype))
