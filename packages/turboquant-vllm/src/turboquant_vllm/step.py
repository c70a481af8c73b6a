"""What a layer is told about a step."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from vllm.v1.attention.backend import AttentionMetadata

from .plan import PromptPlan


@dataclass(frozen=True, slots=True)
class PackedRows:
    """Rows whose few new tokens are attended to from the pages, where they have just been stored.

    Attributes:
        tokens: their tokens, the first of the step.
        block_table: int32 ``[rows, max_pages]``.
        seq_lens: int32 ``[rows]``, new tokens included; 0 for a padded row.
        query_start_loc: int32 ``[rows + 1]``; None when all rows have the same number of tokens.
    """

    tokens: int
    block_table: Tensor
    seq_lens: Tensor
    query_start_loc: Tensor | None


@dataclass(frozen=True, slots=True)
class StepMetadata(AttentionMetadata):  # type: ignore[misc]
    """Decoding rows, which come first, and prompt rows; None where a step has none.

    Attributes:
        packed: the decoding rows.
        prompts: the others.
        slot_mapping: int64 ``[tokens]`` of the whole step, in vLLM's own buffer; -1 for a padded token.
    """

    packed: PackedRows | None
    prompts: PromptPlan | None
    slot_mapping: Tensor
