"""vLLM's own cache types ``turboquant_*`` where this backend serves them (``TURBOQUANT_OVERRIDE_NATIVE=1``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from .errors import OptionError, UnsupportedError
from .options import BITS_VARIABLE, COMPRESS_V_VARIABLE, CONFIG_KEY, Options
from .widths import UNCOMPRESSED, LayerBits

NATIVE_PREFIX = "turboquant_"
_BITS = {
    "turboquant_4bit_nc": LayerBits(4, 4),
    "turboquant_k3v4_nc": LayerBits(3, 4),
    "turboquant_3bit_nc": LayerBits(3, 3),
}
_WIDTHS = ("bits", "k_bits", "v_bits", "compress_v", "preset")


def is_native(cache_dtype: object) -> bool:
    """Whether this is one of vLLM's cache types ``turboquant_*``."""
    return str(cache_dtype).startswith(NATIVE_PREFIX)


def native_options(
    options: Options, cache_dtype: str, additional_config: object, environment: Mapping[str, str]
) -> Options:
    """``options`` with the bits of a cache type.

    Args:
        options: read from the other two.
        cache_dtype: of vLLM, ``turboquant_*``.
        additional_config: of vLLM.
        environment: variables.

    Raises:
        OptionError: something else decides the bits too, or layers are to stay uncompressed, which is vLLM's matter.
        UnsupportedError: a cache type without a counterpart here.
    """
    if cache_dtype not in _BITS:
        raise UnsupportedError(
            f"cache type {cache_dtype} has no counterpart in packed pages; taken over are {', '.join(_BITS)}"
        )
    given = additional_config.get(CONFIG_KEY, {}) if isinstance(additional_config, Mapping) else {}
    beside = [f"{CONFIG_KEY}.{name}" for name in _WIDTHS if name in given]
    beside += [name for name in (BITS_VARIABLE, COMPRESS_V_VARIABLE) if environment.get(name)]
    if beside:
        raise OptionError(
            f"{beside[0]} is given beside --kv-cache-dtype {cache_dtype}, which decides the bits: drop one of them, or "
            "pass --attention-backend FUSED_TURBOQUANT in place of the cache type"
        )
    choices = [choice for _, choice in options.layers] + [options.boundary] * bool(options.boundary_layers)
    if UNCOMPRESSED in choices:
        raise OptionError(
            f"layers that stay uncompressed beside --kv-cache-dtype {cache_dtype} are named to vLLM: pass "
            "--kv-cache-dtype-skip-layers, or --attention-backend FUSED_TURBOQUANT in place of the cache type"
        )
    return replace(options, default=_BITS[cache_dtype])
