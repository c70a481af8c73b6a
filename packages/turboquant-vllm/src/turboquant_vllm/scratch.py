"""Memory that attention needs beside the pages, taken while vLLM measures how much is left for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .merging import MERGE_TOKENS
from .plan import PREFIX_TOKENS
from .setup import LayerSetup
from .windows import drafted_tokens


@dataclass(frozen=True, slots=True)
class Scratch:
    """Scratch memory of one layer; the decoding part is shared with every other layer.

    Attributes:
        nbytes: of the workspace of ``attend`` at its largest.
        tokens: decoding tokens that it was sized for.
        prefix_tokens: tokens of a context that are decoded at a time.
        setup: of the layer.
    """

    nbytes: int
    tokens: int
    prefix_tokens: int
    setup: LayerSetup

    @classmethod
    def of(cls, vllm_config: Any, setup: LayerSetup) -> Scratch:
        """Size it for the largest step of an engine."""
        scheduler = vllm_config.scheduler_config
        captured = getattr(vllm_config.compilation_config, "max_cudagraph_capture_size", None) or 0
        tokens = max(scheduler.max_num_seqs * (1 + drafted_tokens(vllm_config)), captured)
        nbytes = max(
            setup.provider.workspace_bytes(setup.request, tokens, batch)
            for batch in (scheduler.max_num_seqs, tokens, 1)
        )
        return cls(nbytes, tokens, min(vllm_config.model_config.max_model_len, PREFIX_TOKENS), setup)

    def workspace(self, tokens: int, batch: int) -> Tensor | None:
        """Uint8 workspace of ``attend``; None when the provider needs none.

        It is always the whole of it, so that captured CUDA graphs and other steps share one address.
        """
        needed = self.nbytes
        if tokens > self.tokens:
            needed = self.setup.provider.workspace_bytes(self.setup.request, tokens, batch)
        if needed == 0:
            return None
        from vllm.v1.worker.workspace import current_workspace_manager

        workspace: Tensor
        (workspace,) = current_workspace_manager().get_simultaneous(((needed,), torch.uint8))
        return workspace

    def reserve(self, query: Tensor) -> None:
        """Touch what the largest step takes: the workspace, a decoded piece of context, what a merge works with."""
        self.workspace(self.tokens, self.tokens)
        size = self.setup.shape.kv_heads * self.setup.shape.head_dim
        merged = min(query.shape[0], MERGE_TOKENS) if query.device.type == "cpu" else 0
        held = [
            torch.empty(2 * self.prefix_tokens * size, dtype=query.dtype, device=query.device),
            torch.empty_like(query),
            torch.empty((3, *query[:merged].shape), dtype=torch.float32, device=query.device),
        ]
        del held
