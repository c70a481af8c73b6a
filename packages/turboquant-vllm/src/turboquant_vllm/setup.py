"""What each attention layer of an engine gets, decided while the model is built and before its weights are read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from turboquant_core import CacheCodec, KernelProvider, KernelRequest, LayoutError
from turboquant_core.hadamard import factor
from turboquant_core.layout import PAGE_SIZE_MULTIPLE, ExactRows
from turboquant_core.preset import Preset, PresetError

from .centers import read_center
from .errors import OptionError, UnsupportedError
from .kernels import graph_safe, own_codec, provider_for, shared_codec
from .limits import check_equal_pages
from .native import is_native, native_options
from .options import Options, read_options
from .packing import LayerShape, layer_count, layer_index
from .widths import LayerBits, LayerChoice
from .windows import check_exact_rows, exact_provider, exact_rows


def engine_options(vllm_config: Any) -> Options:
    """Options of an engine; the bits are those of the cache type where a ``turboquant_*`` one is taken over.

    Layers of a draft model get the default bits: what is said of single layers is said of the model it drafts for.

    Raises:
        OptionError: see :func:`read_options` and :func:`native_options`, or the preset was made for another model.
        UnsupportedError: a cache type without a counterpart here.
    """
    options = read_options(vllm_config.additional_config, os.environ)
    if is_draft(vllm_config):
        options = replace(options, boundary_layers=0, layers=(), key_centers=None)
    elif options.preset is not None:
        _check_preset(options.preset, vllm_config)
    cache_dtype = str(vllm_config.cache_config.cache_dtype)
    if not is_native(cache_dtype):
        return options
    return native_options(options, cache_dtype, vllm_config.additional_config, os.environ)


def is_draft(vllm_config: Any) -> bool:
    """Whether this is the configuration under which vLLM builds a draft model."""
    speculative = vllm_config.speculative_config
    if speculative is None or vllm_config.model_config is speculative.target_model_config:
        return False
    return vllm_config.model_config is speculative.draft_model_config


def _check_preset(preset: Preset, vllm_config: Any) -> None:
    try:
        preset.check(vllm_config.model_config.hf_config)
    except PresetError as error:
        raise OptionError(f"turboquant.preset: {error}") from error


def layer_choice(options: Options, vllm_config: Any, layer_name: str) -> LayerChoice:
    """Bits of a layer, or that it stays uncompressed.

    Raises:
        OptionError: the options name a layer that the model does not have, or one twice.
    """
    count = layer_count(vllm_config)
    options.check_layers(count)
    return options.layer(layer_index(layer_name), count)


def engine_device() -> torch.device:
    """Device on which this process runs its model."""
    from vllm.platforms import current_platform

    kind = current_platform.device_type
    return torch.device(kind) if kind == "cpu" else torch.device(kind, torch.accelerator.current_device_index())


@dataclass(frozen=True, slots=True)
class LayerSetup:
    """Everything about a layer that does not depend on its pages.

    Attributes:
        name: of the layer whose pages are read.
        shape: of a token.
        bits: widths of the codes.
        options: of the engine.
        provider: who packs and attends.
        request: what the provider was asked for.
        center: float32 ``[kv_heads, head_dim]`` or None.
        exact: rows of a page for tokens in full precision.
        page_size: tokens of a block that vLLM was asked for.
    """

    name: str
    shape: LayerShape
    bits: LayerBits
    options: Options
    provider: KernelProvider
    request: KernelRequest
    center: Tensor | None
    exact: ExactRows = ExactRows()  # noqa: RUF009 (immutable)
    page_size: int = PAGE_SIZE_MULTIPLE

    def codec(self, page_size: int) -> CacheCodec:
        """Codecs of pages of ``page_size`` tokens, on the device.

        Raises:
            UnsupportedError: exact rows were counted for another page size.
        """
        if self.exact.rows and page_size != self.page_size:
            raise UnsupportedError(
                f"vLLM made blocks of {page_size} tokens where {self.page_size} were asked for; with tokens in full "
                "precision they must be the same: set --block-size, or drop turboquant.sink_tokens and recent_tokens"
            )
        o, device = self.options, self.request.device
        layout = self.shape.page_layout(self.bits, page_size, self.exact)
        if self.center is None:
            return shared_codec(layout, o.seed, o.key_scale, o.value_scale, device)
        return own_codec(layout, o.seed, o.key_scale, o.value_scale, device, self.center)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token and KV head, a share of its page's exact rows included."""
        return self.shape.page_layout(self.bits, self.page_size, self.exact).slot_bytes


def set_up_layer(vllm_config: Any, layer_name: str, q_heads: int, shape: LayerShape, dtype: torch.dtype) -> LayerSetup:
    """Choose bits and provider of a layer, reading its key center if there is one.

    Raises:
        OptionError: an option does not fit the model.
        UnsupportedError: the layer cannot be packed; names it.
        ProviderError: no kernel provider fits.
    """
    options = engine_options(vllm_config)
    check_equal_pages(options, vllm_config)
    bits = layer_choice(options, vllm_config, layer_name)
    if not isinstance(bits, LayerBits):
        raise OptionError(f"layer {layer_name} shares pages that are packed and cannot itself be uncompressed")
    try:
        factor(shape.head_dim)
        page_size = vllm_config.cache_config.block_size or PAGE_SIZE_MULTIPLE
        exact = exact_rows(options, vllm_config, shape.itemsize)
        check_exact_rows(exact, shape, bits, page_size)
        layout = shape.page_layout(bits, page_size, exact) if exact.rows else shape.page_layout(bits)
    except LayoutError as error:
        raise UnsupportedError(
            f"layer {layer_name} cannot be packed: {error}. Name it in turboquant.layers as 'uncompressed'"
        ) from error
    request = KernelRequest(layout, engine_device(), dtype, q_heads // shape.kv_heads)
    provider = provider_for(request, options.provider)
    if exact.rows:
        exact_provider(provider)
    center = _center(vllm_config, options, layer_name, shape)
    return LayerSetup(layer_name, shape, bits, options, provider, request, center, exact, layout.page_size)


def _center(vllm_config: Any, options: Options, layer_name: str, shape: LayerShape) -> Tensor | None:
    index = layer_index(layer_name)
    if options.key_centers is None or index is None or index >= layer_count(vllm_config):
        return None
    from vllm.distributed import get_tensor_model_parallel_rank

    ranks = vllm_config.parallel_config.tensor_parallel_size
    all_heads = vllm_config.model_config.get_total_num_kv_heads()
    # Fewer heads than ranks: neighbouring ranks hold the same one.
    first = get_tensor_model_parallel_rank() * all_heads // ranks
    return read_center(options.key_centers, index, shape.head_dim, shape.kv_heads, first, all_heads)


def packed_layers(vllm_config: Any) -> Iterator[LayerSetup]:
    """Setups of the layers of this process that have pages of their own."""
    for layer in vllm_config.compilation_config.static_forward_context.values():
        setup = getattr(getattr(layer, "impl", None), "setup", None)
        if isinstance(setup, LayerSetup) and layer.layer_name == setup.name:
            yield setup


def engine_captures(vllm_config: Any) -> bool:
    """Whether the providers of all packed layers may be captured in CUDA graphs."""
    return all(graph_safe(setup.provider) for setup in packed_layers(vllm_config))
