"""The attention backend that vLLM finds by name."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import AttentionBackend, MultipleOf

from turboquant_core.hadamard import supported_order
from turboquant_core.layout import HEAD_DIM_MULTIPLE, MAX_HEAD_DIM, PAGE_SIZE_MULTIPLE

from .compat import backend_sizes_pages, head_major_layouts, is_packed, packed_spec
from .hooks import built_bits, sized_token_bytes
from .impl import PackedAttention
from .limits import CACHE_DTYPES, ELSEWHERE, quantized_cache
from .metadata import StepMetadataBuilder
from .native import is_native
from .packing import LayerShape
from .registration import BACKEND_NAME


class FusedTurboQuantBackend(AttentionBackend):  # type: ignore[misc]
    """Attention over pages of 2 to 4 bits a coordinate (``--attention-backend FUSED_TURBOQUANT``)."""

    accept_output_buffer: bool = True
    forward_includes_kv_cache_update: bool = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]

    @staticmethod
    def get_name() -> str:
        """Name among vLLM's backends."""
        return BACKEND_NAME

    @staticmethod
    def get_impl_cls() -> type[PackedAttention]:
        """The attention of one layer."""
        return PackedAttention

    @staticmethod
    def get_builder_cls() -> type[StepMetadataBuilder]:
        """Builder of what all layers of a step share."""
        return StepMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """Any page that the layout knows, so that vLLM never splits one."""
        return [MultipleOf(PAGE_SIZE_MULTIPLE)]

    @classmethod
    def supports_dtype(cls, dtype: torch.dtype) -> bool:
        """Single precision on a CPU only, where no FlashAttention is needed."""
        from vllm.platforms import current_platform

        return dtype in cls.supported_dtypes and (dtype != torch.float32 or current_platform.is_cpu())

    @classmethod
    def supports_kv_cache_dtype(cls, kv_cache_dtype: str | None) -> bool:
        """The model's own dtype only: packed pages take its place."""
        return kv_cache_dtype is None or kv_cache_dtype in CACHE_DTYPES

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        """Sizes with a rotation."""
        return head_size % HEAD_DIM_MULTIPLE == 0 and head_size <= MAX_HEAD_DIM and supported_order(head_size)

    @classmethod
    def supports_sink(cls) -> bool:
        """Attention sinks are an argument of the kernels."""
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """Where a backend sizes pages, those of sliding-window layers are among them."""
        return backend_sizes_pages()

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        """Long contexts are split by the number of processors and merged."""
        return False

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        """Steps are planned from the host's lengths."""
        return False

    @classmethod
    def supports_combination(
        cls, head_size: int, dtype: torch.dtype, kv_cache_dtype: str | None, *rest: Any, **more: Any
    ) -> str | None:
        """A sentence for what the one-word reasons of vLLM leave open."""
        if kv_cache_dtype is not None and not cls.supports_kv_cache_dtype(kv_cache_dtype):
            return quantized_cache(kv_cache_dtype)
        if not cls.supports_head_size(head_size):
            return (
                f"head_dim is {head_size}; packed are multiples of {HEAD_DIM_MULTIPLE} up to {MAX_HEAD_DIM} that have "
                f"a Hadamard matrix: {ELSEWHERE}"
            )
        if not cls.supports_dtype(dtype):
            return f"dtype is {dtype}; packed pages on a GPU serve float16 and bfloat16: pass --dtype bfloat16"
        use_mla = more.get("use_mla", rest[1] if len(rest) > 1 else False)
        return f"latent attention keeps no keys that could be packed: {ELSEWHERE}" if use_mla else None

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """Pages of packed bytes: of the layer at hand, or of those just built, to which vLLM aligns others."""
        if is_packed(spec):
            return spec
        token_bytes = sized_token_bytes()
        if token_bytes is None:
            shape = LayerShape(spec.num_kv_heads, spec.head_size, spec.dtype.itemsize)
            token_bytes = shape.token_bytes(built_bits())
        return packed_spec(spec, token_bytes)

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[Any, ...]:
        """Tokens of a block and head next to one another, blocks of a layer one after the other."""
        return head_major_layouts()

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype_str: str = "auto"
    ) -> tuple[int, ...]:
        """``[blocks, kv_heads, block_size, bytes]``; the bytes follow from the page (they differ between layers)."""
        return (num_blocks, num_kv_heads, block_size, -1)

    @staticmethod
    def get_kv_cache_stride_order(include_num_layers_dimension: bool = False) -> tuple[int, ...]:
        """As in the shape; layers stay apart, which keeps each layer's pages contiguous."""
        return tuple(range(5 if include_num_layers_dimension else 4))


class TakeoverBackend(FusedTurboQuantBackend):
    """The same for vLLM's cache types ``turboquant_*`` (``TURBOQUANT_OVERRIDE_NATIVE=1``)."""

    @staticmethod
    def get_name() -> str:
        """vLLM's name for its own backend of these types."""
        return "TURBOQUANT"

    @classmethod
    def supports_kv_cache_dtype(cls, kv_cache_dtype: str | None) -> bool:
        """The types taken over; which of them have a counterpart is said when a layer is built."""
        return is_native(kv_cache_dtype)
