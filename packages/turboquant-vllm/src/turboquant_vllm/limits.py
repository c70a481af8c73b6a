"""What a layer may ask for, and the message where it may not."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .errors import UnsupportedError
from .native import is_native
from .options import Options
from .packing import layer_count

_ATTENTION = ("full_attention", "sliding_attention")
CONNECTORS = ("OffloadingConnector", "ExampleConnector")
"""KV connectors that move whole blocks within an engine, or between engines that were given the same options."""
OFFLOADING_SPEC = "CPUOffloadingSpec"
CACHE_DTYPES = ("auto", "float16", "bfloat16")
"""Cache types that leave what a page holds to this backend."""
ELSEWHERE = "serve this model with another --attention-backend"


def check_layer_arguments(
    *, alibi_slopes: Any, kv_cache_dtype: str, attn_type: str, sliding_window: int | None, extra: dict[str, Any]
) -> None:
    """Raise ``UnsupportedError`` for arguments of an attention layer that packed attention would have to ignore."""
    if alibi_slopes is not None:
        raise UnsupportedError(f"ALiBi slopes are not supported over packed pages: {ELSEWHERE}")
    if attn_type != "decoder":
        raise UnsupportedError(f"attention type {attn_type!r} has no packed pages: {ELSEWHERE}")
    if kv_cache_dtype not in CACHE_DTYPES and not is_native(kv_cache_dtype):
        raise UnsupportedError(quantized_cache(kv_cache_dtype))
    unknown = sorted(name for name, value in extra.items() if value not in (None, False))
    if unknown:
        raise UnsupportedError(f"this model's attention takes {', '.join(unknown)}, not supported here: {ELSEWHERE}")
    if sliding_window is not None:
        check_sliding_window()


def quantized_cache(kv_cache_dtype: str) -> str:
    """Message for a cache type of vLLM's own; a checkpoint with scales for it chooses it where the user did not."""
    return (
        f"packed pages replace the KV cache type {kv_cache_dtype!r}, which --kv-cache-dtype or the checkpoint asks "
        "for: pass --kv-cache-dtype bfloat16 (or float16)"
    )


def check_sliding_window() -> None:
    """Raise ``UnsupportedError`` on a vLLM that cannot give sliding-window layers packed pages."""
    from .compat import backend_sizes_pages

    if not backend_sizes_pages():
        raise UnsupportedError("sliding-window layers can be packed from vLLM 0.28 on: upgrade vLLM, or " + ELSEWHERE)


def check_engine(vllm_config: Any) -> None:
    """Raise ``UnsupportedError`` for hybrids below 0.28, and for steps that attention here knows nothing of.

    These are sequences split over ranks, steps run as two that overlap, and prompts of which layers that share pages
    see the last token only. Layers left out by an option for cache types, which pages are not, and connectors that
    would read pages elsewhere are refused too.
    """
    from .compat import backend_sizes_pages

    if getattr(vllm_config.model_config, "is_hybrid", False) and not backend_sizes_pages():
        raise UnsupportedError(
            "attention beside state-space layers can be packed from vLLM 0.28 on: upgrade vLLM, or " + ELSEWHERE
        )
    parallel = vllm_config.parallel_config
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        size = getattr(parallel, name, 1)
        if size > 1:
            raise UnsupportedError(f"{name} is {size}; packed pages work with 1: use tensor parallelism")
    if getattr(parallel, "use_ubatching", False):
        raise UnsupportedError("steps split in two that overlap (--enable-dbo) do not work over packed pages: drop it")
    if getattr(vllm_config.cache_config, "kv_sharing_fast_prefill", False):
        raise UnsupportedError("--kv-sharing-fast-prefill does not work over packed pages: drop it")
    cache = vllm_config.cache_config
    if getattr(cache, "kv_cache_dtype_skip_layers", None) and not is_native(cache.cache_dtype):
        raise UnsupportedError(
            "--kv-cache-dtype-skip-layers leaves out layers of a KV cache type, and packed pages are none: name the "
            "layers in turboquant.layers as 'uncompressed'"
        )
    check_connector(getattr(vllm_config, "kv_transfer_config", None))


def check_connector(transfer: Any) -> None:
    """Raise ``UnsupportedError`` for a KV connector that is not one of :data:`CONNECTORS`.

    What a block's bytes mean depends on bits, seed and scale rules. No other connector has been shown to compare them:
    one that does not would read the bytes of other options as its own.
    """
    name = getattr(transfer, "kv_connector", None)
    if name is None:
        return
    if name not in CONNECTORS or getattr(transfer, "kv_connector_module_path", None):
        raise UnsupportedError(
            f"KV connector {name!r} may take packed pages of other options for its own; {' and '.join(CONNECTORS)} "
            "work: use --kv-offloading-size with the native backend to offload blocks, or drop --kv-transfer-config"
        )
    spec = transfer.kv_connector_extra_config.get("spec_name", OFFLOADING_SPEC)
    if spec != OFFLOADING_SPEC:
        raise UnsupportedError(
            f"offloading by {spec!r} may keep packed pages for engines of other options; {OFFLOADING_SPEC} works: drop "
            "spec_name from kv_connector_extra_config"
        )


def _kinds(vllm_config: Any) -> list[str]:
    """Kinds of layers that the model has; none where its configuration does not name them."""
    return sorted(set(getattr(vllm_config.model_config.hf_text_config, "layer_types", None) or ()))


def check_equal_pages(options: Options, vllm_config: Any) -> None:
    """Raise ``UnsupportedError`` for unequal layers where layers of several kinds share blocks.

    vLLM then fills the smaller page up, and the pages of a layer no longer lie one after the other.
    """
    if len(_kinds(vllm_config)) < 2:
        return
    kinds, count = vllm_config.model_config.hf_text_config.layer_types, layer_count(vllm_config)
    attending = [index for index in range(count) if index >= len(kinds) or kinds[index].endswith(_ATTENTION)]
    choices = dict.fromkeys(str(options.layer(index, count)) for index in attending)
    if len(choices) > 1:
        raise UnsupportedError(
            f"this model's layers are of several kinds ({', '.join(sorted(set(kinds)))}), which share blocks, and must "
            f"then be packed alike; asked for are: {'; '.join(choices)}. Give all layers equal bits"
        )


def check_block_mates(setup: Any, others: Iterable[Any], vllm_config: Any) -> None:
    """Raise ``UnsupportedError`` for a layer whose pages cannot share blocks with those of layers built before it.

    Layers of several kinds share blocks. vLLM gives more tokens to the smaller of two pages where the larger one is a
    multiple of it; else it fills it up, and the pages of a layer no longer lie one after the other.

    Args:
        setup: ``LayerSetup`` of the layer.
        others: those of the layers built before.
        vllm_config: of the engine.
    """
    kinds = _kinds(vllm_config)
    if len(kinds) < 2:
        return
    for other in others:
        sizes = sorted(each.token_bytes * each.shape.kv_heads for each in (setup, other))
        if sizes[1] % sizes[0]:
            told = " and ".join(
                f"{each.name} (head_dim {each.shape.head_dim}, {each.shape.kv_heads} KV heads)"
                for each in (other, setup)
            )
            raise UnsupportedError(
                f"layers {told} have pages of which the larger is no multiple of the smaller; this model's layers are "
                f"of several kinds ({', '.join(kinds)}), which share blocks: {ELSEWHERE}"
            )


def check_page(spec: Any) -> None:
    """Raise ``UnsupportedError`` when vLLM fills the pages of a layer up to those of other layers."""
    padded = getattr(spec, "page_size_padded", None)
    if padded is not None and padded != spec.real_page_size_bytes:
        raise UnsupportedError(
            f"vLLM fills pages of {spec.real_page_size_bytes} bytes up to {padded}, those of other layers of this "
            f"model; packed pages must lie one after the other: give all layers equal bits, or {ELSEWHERE}"
        )


def check_center(options: Options, softcap: float | None, sinks: Any) -> None:
    """Raise ``UnsupportedError`` for centred keys where a constant added to all scores changes the result."""
    if options.key_centers is not None and (softcap is not None or sinks is not None):
        name = "a soft-cap" if softcap is not None else "attention sinks"
        raise UnsupportedError(f"turboquant.key_centers does not work for a model with {name}: drop it")
