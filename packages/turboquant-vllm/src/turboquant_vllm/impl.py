"""Attention of one layer over its packed pages."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionImpl

from turboquant_core import CacheCodec
from turboquant_core.exact import ExactRowsProvider, attend_with_exact

from .errors import UnsupportedError
from .exact_context import ExactContext
from .limits import ELSEWHERE, check_block_mates, check_center, check_engine, check_layer_arguments
from .packing import LayerShape
from .plan import PromptPlan
from .prompts import PromptAttention
from .raw_attention import RawAttention, Scoring, flash_attention, torch_attention
from .scratch import Scratch
from .setup import LayerSetup, engine_device, packed_layers, set_up_layer
from .step import PackedRows, StepMetadata
from .windows import check_exact_layer, exact_provider


class PackedAttention(AttentionImpl[StepMetadata]):  # type: ignore[misc]
    """What vLLM calls for each layer: first :meth:`do_kv_cache_update`, then :meth:`forward`.

    Raises:
        UnsupportedError: the layer asks for something that would have to be ignored; names it.
    """

    supports_quant_query_input: bool = False
    supports_pcp: bool = False
    supports_dcp: bool = False
    can_return_lse_for_decode: bool = False

    setup: LayerSetup

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
        **extra: Any,
    ) -> None:
        check_layer_arguments(
            alibi_slopes=alibi_slopes,
            kv_cache_dtype=kv_cache_dtype,
            attn_type=attn_type,
            sliding_window=sliding_window,
            extra=extra,
        )
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.sinks = sinks
        self.scoring = Scoring(self.scale, sliding_window, logits_soft_cap or None)
        self._codecs: dict[int, CacheCodec] = {}
        self._exact: ExactRowsProvider | None = None

    def set_up(self, layer: Any, vllm_config: Any) -> None:
        """Choose bits and kernels once the layer has its name; ``layer`` is the ``Attention`` that owns this.

        Raises:
            OptionError: an option does not fit the model.
            UnsupportedError: the layer cannot be packed.
            ProviderError: no kernel provider fits.
        """
        check_engine(vllm_config)
        if getattr(layer, "head_size_v", self.head_size) != self.head_size:
            raise UnsupportedError(
                f"layer {layer.layer_name} has keys of {self.head_size} and values of {layer.head_size_v} "
                f"coordinates; packed pages serve equal sizes: {ELSEWHERE}"
            )
        shape = LayerShape(self.num_kv_heads, self.head_size, layer.dtype.itemsize)
        name = self.kv_sharing_target_layer_name or layer.layer_name
        self.setup = set_up_layer(vllm_config, name, self.num_heads, shape, layer.dtype)
        check_center(self.setup.options, self.scoring.softcap, self.sinks)
        shares_pages = self.kv_sharing_target_layer_name is not None
        if not shares_pages:
            check_block_mates(self.setup, packed_layers(vllm_config), vllm_config)
        check_exact_layer(self.setup.options, sliding_window=self.scoring.window, shares_pages=shares_pages)
        self._exact = exact_provider(self.setup.provider) if self.setup.exact.rows else None
        on_cpu = engine_device().type == "cpu"
        self._attention: RawAttention = torch_attention if on_cpu else flash_attention(self.head_size)
        self._scratch = Scratch.of(vllm_config, self.setup)

    def prepare(self, page_size: int) -> None:
        """Make the codecs of pages of ``page_size`` tokens, before CUDA graphs are captured."""
        if page_size not in self._codecs:
            self._codecs[page_size] = self.setup.codec(page_size)

    def kind(self, page_size: int) -> Hashable:
        """What the forms of this layer's kernels depend on: layers of one kind launch the same ones."""
        scoring, setup, options = self.scoring, self.setup, self.setup.options
        given = (scoring.window, scoring.softcap, self.sinks, setup.center, self.kv_sharing_target_layer_name)
        rules = (options.key_scale, options.value_scale, options.prefill, options.recent_tokens)
        return (page_size, self.num_heads, setup.request, setup.exact, rules, *(x is not None for x in given))

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Pack new keys and values ``[tokens, kv_heads, head_dim]`` into their slots; slot -1 is skipped."""
        if kv_cache.numel() == 0:
            return
        pages, codec = self._pages(kv_cache)
        tokens = slot_mapping.shape[0]
        self.setup.provider.store(key[:tokens], value[:tokens], pages, slot_mapping, codec)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        kv_cache: Tensor,
        attn_metadata: StepMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attention of the step's tokens, written to ``output`` ``[tokens, q_heads, head_dim]``.

        ``key`` is None, or not used, where the layer reads another layer's pages. Without metadata (vLLM measures its
        memory) only the scratch memory is touched.
        """
        if attn_metadata is None:
            self._scratch.reserve(query)
            return output.fill_(0)
        pages, codec = self._pages(kv_cache)
        exact = None
        if self._exact is not None:
            exact = self._write_exact(self._exact, key, value, pages, codec, attn_metadata)
        if attn_metadata.packed is not None:
            self._attend_packed(query, pages, codec, attn_metadata.packed, output)
        if attn_metadata.prompts is not None:
            self._attend_prompts(query, key, value, pages, codec, attn_metadata.prompts, output, exact)
        return output

    def _write_exact(
        self,
        provider: ExactRowsProvider,
        key: Tensor | None,
        value: Tensor | None,
        pages: Tensor,
        codec: CacheCodec,
        step: StepMetadata,
    ) -> ExactContext | None:
        """Write the exact rows of the step's tokens, once what prompts need of the old ones is read.

        Not where they are packed: that may be part of a CUDA graph while prompts are planned outside of it.
        """
        assert key is not None
        assert value is not None
        context = None
        if step.prompts is not None:
            recent, dtype = self.setup.options.recent_tokens, self.setup.request.dtype
            context = ExactContext.before_writing(recent, pages, codec.layout, step.prompts, dtype)
        tokens = step.slot_mapping.shape[0]
        provider.store_exact(key[:tokens], value[:tokens], pages, step.slot_mapping, codec.layout)
        return context

    def _attend_packed(self, query: Tensor, pages: Tensor, codec: CacheCodec, rows: PackedRows, output: Tensor) -> None:
        arguments = (query[: rows.tokens], pages, rows.block_table, rows.seq_lens, codec)
        options: dict[str, Any] = {
            "scaling": self.scoring.scaling,
            "query_start_loc": rows.query_start_loc,
            "softcap": self.scoring.softcap,
            "sinks": self.sinks,
            "out": output[: rows.tokens],
            "workspace": self._scratch.workspace(rows.tokens, rows.seq_lens.shape[0]),
        }
        if self._exact is not None:
            attend_with_exact(self._exact, *arguments, recent=self.setup.options.recent_tokens, **options)
        else:
            self.setup.provider.attend(*arguments, window=self.scoring.window, **options)

    def _attend_prompts(
        self,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        pages: Tensor,
        codec: CacheCodec,
        plan: PromptPlan,
        output: Tensor,
        exact: ExactContext | None,
    ) -> None:
        tokens = slice(plan.first_token, plan.first_token + plan.tokens)
        attention = PromptAttention(self._attention, self.scoring, self.setup.provider, codec, pages, self.sinks, exact)
        from_pages = self.kv_sharing_target_layer_name is not None or self.setup.options.prefill == "packed"
        if from_pages and exact is not None and exact.recent and key is not None and value is not None:
            attention.attend_recent(query[tokens], key[tokens], value[tokens], plan, output[tokens])
        elif from_pages or key is None or value is None:
            attention.attend_packed(query[tokens], plan, output[tokens])
        else:
            attention.attend_raw(query[tokens], key[tokens], value[tokens], plan, output[tokens])

    def _pages(self, kv_cache: Tensor) -> tuple[Tensor, CacheCodec]:
        """Pages behind vLLM's view ``[blocks, kv_heads, block_size, token_bytes]``, and their codecs.

        Raises:
            UnsupportedError: vLLM laid the blocks out in a way that packed pages cannot be read in.
        """
        blocks, heads, page_size, token_bytes = kv_cache.shape
        if not kv_cache.is_contiguous():
            raise UnsupportedError(
                f"vLLM's KV cache has strides {kv_cache.stride()} for shape {tuple(kv_cache.shape)}; packed pages need "
                "the blocks of a layer one after the other: leave VLLM_KV_CACHE_LAYOUT unset, and give layers that "
                "share a block equal bits"
            )
        self.prepare(page_size)
        return kv_cache.view(torch.uint8).view(blocks, heads, page_size * token_bytes), self._codecs[page_size]
