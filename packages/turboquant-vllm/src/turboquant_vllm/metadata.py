"""What is built once for all layers of a group: the metadata of each step, and their kernels."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadataBuilder
from vllm.v1.attention.backends.utils import split_decodes_and_prefills

from .errors import UnsupportedError
from .limits import check_page
from .plan import prompt_plan
from .report import announce
from .setup import engine_captures
from .step import PackedRows, StepMetadata
from .warming import warm_up


class StepMetadataBuilder(AttentionMetadataBuilder[StepMetadata]):  # type: ignore[misc]
    """Builder of :class:`StepMetadata`."""

    # Decoding rows of equal length are one captured call; prompts are planned on the host.
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        check_page(kv_cache_spec)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        layers = vllm_config.compilation_config.static_forward_context
        attention = [layers[name].impl for name in layer_names]
        for layer in attention:
            layer.prepare(kv_cache_spec.block_size)
        announce(vllm_config)
        warm_up(attention, vllm_config, self.reorder_batch_threshold or 1, kv_cache_spec.block_size, device)

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """``UNIFORM_BATCH`` when the provider of every layer may be captured, else ``NEVER``."""
        return cls._cudagraph_support if engine_captures(vllm_config) else AttentionCGSupport.NEVER

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> StepMetadata:
        """Metadata of a step; vLLM passes these arguments by name in some versions.

        Raises:
            UnsupportedError: attention is not causal.
        """
        common = common_attn_metadata
        if common.causal is not True:
            raise UnsupportedError(
                "attention over packed pages is causal; this model or its draft model asks for other"
            )
        decoding = split_decodes_and_prefills(common, decode_threshold=self.reorder_batch_threshold)[0]
        starts = common.query_start_loc_cpu.tolist()
        prompts = None
        if decoding < common.num_reqs:
            prompts = prompt_plan(starts, _lengths(common, decoding), common.block_table_tensor, decoding)
        packed = _packed_rows(common, decoding, starts) if decoding else None
        return StepMetadata(packed, prompts, common.slot_mapping[: common.num_actual_tokens])


def _packed_rows(common: Any, rows: int, starts: list[int]) -> PackedRows:
    tokens = starts[rows]
    equal = tokens % rows == 0 and starts[: rows + 1] == list(range(0, tokens + 1, max(tokens // rows, 1)))
    return PackedRows(
        tokens,
        common.block_table_tensor[:rows],
        common.seq_lens[:rows],
        None if equal else common.query_start_loc[: rows + 1],
    )


def _lengths(common: Any, first_row: int) -> list[int]:
    """Tokens of each sequence on the host."""
    bound = getattr(common, "seq_lens_cpu_upper_bound", None)
    prefilling = getattr(common, "is_prefilling", None)
    # The bound is exact for prompts; a verified draft that came after a prompt may have been shortened on the device.
    exact = prefilling is None or bool(prefilling[first_row : common.num_reqs].all())
    lengths = bound if bound is not None and exact else common.seq_lens.cpu()
    return [int(length) for length in lengths[: common.num_reqs]]
