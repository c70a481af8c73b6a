"""First and recent tokens in full precision: the rows that pages get for them, and where that makes no sense."""

from __future__ import annotations

from typing import Any

from turboquant_core import KernelProvider
from turboquant_core.exact import ExactRowsProvider
from turboquant_core.layout import ExactRows

from .errors import OptionError, UnsupportedError
from .options import Options
from .packing import LayerShape
from .widths import LayerBits


def drafted_tokens(vllm_config: Any) -> int:
    """Most tokens of a sequence that a step writes beyond its first one."""
    speculative = vllm_config.speculative_config
    # A parallel draft model appends as many tokens again to those that are verified.
    return 0 if speculative is None else 2 * (speculative.num_speculative_tokens or 0)


def exact_rows(options: Options, vllm_config: Any, itemsize: int) -> ExactRows:
    """Rows of every page: the first tokens, and a ring of the recent ones with room for drafts to be rejected."""
    ring = options.recent_tokens + drafted_tokens(vllm_config) if options.recent_tokens else 0
    return ExactRows(options.sink_tokens, ring, itemsize)


def check_exact_rows(exact: ExactRows, shape: LayerShape, bits: LayerBits, page_size: int) -> None:
    """Raise ``OptionError`` for rows that a block cannot hold, or that cost more than packing saves."""
    if exact.rows == 0:
        return
    asked = f"turboquant.sink_tokens and recent_tokens need {exact.first} + {exact.ring} rows a block"
    if max(exact.first, exact.ring) > page_size:
        raise OptionError(f"{asked}, and blocks have {page_size} tokens: set --block-size 512, or ask for fewer")
    slot_bytes = shape.page_layout(bits, page_size, exact).slot_bytes
    if slot_bytes >= shape.uncompressed_token_bytes:
        raise OptionError(
            f"{asked}; with blocks of {page_size} tokens that makes {slot_bytes} bytes a token and head, no fewer than "
            f"the {shape.uncompressed_token_bytes} without packing: set --block-size 512, or ask for fewer"
        )


def check_exact_layer(options: Options, *, sliding_window: int | None, shares_pages: bool) -> None:
    """Raise ``UnsupportedError`` for layers that cannot have tokens in full precision."""
    if not options.sink_tokens and not options.recent_tokens:
        return
    reason = None
    if sliding_window is not None:
        reason = f"a layer with a sliding window of {sliding_window}, whose first blocks vLLM gives back"
    elif shares_pages:
        reason = "a layer that reads another layer's pages, after that one has written them"
    if reason is not None:
        raise UnsupportedError(f"turboquant.sink_tokens and recent_tokens do not work for {reason}: drop them")


def exact_provider(provider: KernelProvider) -> ExactRowsProvider:
    """``provider``, which must have the operations on exact rows.

    Raises:
        UnsupportedError: it has not.
    """
    if not isinstance(provider, ExactRowsProvider):
        raise UnsupportedError(
            f"kernel provider {provider.name!r} has no tokens in full precision inside pages: drop "
            "turboquant.sink_tokens and recent_tokens, or choose a provider that has store_exact and attend_exact"
        )
    return provider
