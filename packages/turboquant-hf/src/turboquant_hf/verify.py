"""Compare a model over packed pages with the same model over a stock cache of the same decoded vectors.

Quantization changes logits by design, wiring must not. The stock cache here holds what the pages decode to, so that
everything that remains - masks, positions, scaling, heads - has to agree to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from turboquant_core import TurboQuantError

from .arguments import check_model
from .cache import TurboQuantCache
from .check_steps import ALL_TOKENS, run_steps
from .compat import Cache, DynamicCache, PreTrainedModel
from .layer import TurboQuantLayer
from .packed_layer import PackedLayer
from .quality import LayerQuality, probe_layers
from .round_trip import round_trip
from .static_cache import TurboQuantStaticCache

TOLERANCE = {torch.float32: 2e-3, torch.float16: 0.15, torch.bfloat16: 0.15}
"""Norm of the difference of logits allowed, relative to theirs.

In half precision, rounding in one layer changes codes in the next, the more the fewer bits: the model in `examples`
comes to 0.09 at 2 bits, and to 0.26 where scores are twice what they should be. The permute kernels multiply by int8
queries, which is part of the figure.
"""


class DecodedUpdate:
    """Update of a stock layer that keeps each vector exact and as packing makes it, side by side, and gives the one
    that the packed layer would have.

    Args:
        packed: an empty packed layer.
        stock: the layer of Transformers in its place.
    """

    def __init__(self, packed: TurboQuantLayer, stock: Any) -> None:
        self.packed, self.stock, self.border = packed, stock, 0
        self._stock_update = stock.update

    def __call__(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As the packed layer: raw at first, then everything that was stored."""
        old: int = self.stock.get_seq_length()
        if not self.packed.is_initialized:
            self.packed.lazy_initialization(key_states, value_states)
        decoded = self._round_trip(key_states, value_states)
        both = (torch.cat(pair, -1) for pair in zip((key_states, value_states), decoded, strict=True))
        keys, values = self._stock_update(*both)
        length = old + key_states.shape[2]
        self.border = max(min(self.border, old), length - self.packed.windows.unpacked(length, min(self.border, old)))
        is_exact = self._is_exact(length, keys)
        return (key_states, value_states) if old == 0 else (_choose(keys, is_exact), _choose(values, is_exact))

    def _is_exact(self, length: int, keys: Tensor) -> Tensor:
        """Bool ``[batch, 1, tokens, 1]``: which of the last tokens are in a window of the packed layer."""
        batch, tokens = keys.shape[0], keys.shape[2]
        starts = self.packed.padding.starts(batch)
        starts = torch.zeros(batch, dtype=torch.int64, device=keys.device) if starts is None else starts
        position = torch.arange(length - tokens, length, device=keys.device)
        after = position - starts.unsqueeze(1)
        is_sink = (after >= 0) & (after < self.packed.windows.sink_tokens)
        return (is_sink | (position >= self.border))[:, None, :, None]

    def _round_trip(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        store = self.packed.packed_sequences
        return round_trip(store.codec, store.provider, key, value)


def _choose(both: Tensor, is_exact: Tensor) -> Tensor:
    exact, decoded = both.chunk(2, -1)
    return torch.where(is_exact, exact, decoded)


def decoded_twin(cache: TurboQuantCache, config: Any) -> DynamicCache:
    """A stock cache that will hold what ``cache`` (empty, and of no other use afterwards) would decode to."""
    twin = DynamicCache(config=config)
    layers: list[Any] = twin.layers
    for packed, stock in zip(cache.layers, layers, strict=True):
        if isinstance(packed, TurboQuantLayer):
            stock.update = DecodedUpdate(packed, stock)
    # Where a patched model looks for it.
    vars(twin)["padding"] = cache.padding
    return twin


@dataclass(frozen=True, slots=True)
class Verification:
    """What was compared.

    Attributes:
        error: largest difference of logits relative to their root mean square.
        tolerance: what is allowed.
        layers: what packing does to the attention of each packed layer.
    """

    error: float
    tolerance: float
    layers: tuple[LayerQuality, ...]


def verify_model(model: PreTrainedModel, make_cache: Callable[[], TurboQuantCache]) -> Verification:
    """Check the wiring, and measure quality: padded batch, prompt, single steps, a step of several tokens over a past.

    Args:
        model: the model, patched or not.
        make_cache: gives an empty packed cache.

    Raises:
        ValueError: ``model`` is no loaded model.
        TurboQuantError: logits over packed pages differ from those over the same decoded vectors, or the model fails.
    """
    model = check_model(model)
    cache = make_cache()
    probes = probe_layers(cache)
    error, tolerance = _compare(model, cache, make_cache())
    return Verification(error, tolerance, tuple(probe.quality(index) for index, probe in probes.items()))


def verify_static(
    model: PreTrainedModel,
    make_static: Callable[[int], TurboQuantStaticCache],
    make_cache: Callable[[], TurboQuantCache],
) -> None:
    """Check the wiring over a static cache, uncompiled, in the same steps.

    Args:
        model: the model, patched or not.
        make_static: gives an empty static cache with room for so many tokens.
        make_cache: gives an empty growing cache with the same options.

    Raises:
        TurboQuantError: logits over packed pages differ from those over the same decoded vectors, or the model fails
            over a static cache.
    """
    _compare(model, make_static(ALL_TOKENS), make_cache())


def _compare(model: PreTrainedModel, cache: Cache, reference: TurboQuantCache) -> tuple[float, float]:
    """Error of ``cache`` against the twin of ``reference``, and the tolerance that it keeps."""
    for layer in (*cache.layers, *reference.layers):
        if isinstance(layer, PackedLayer):
            # A search chooses between codes that are equally good by rounding, in which the two differ.
            layer.options = replace(layer.options, scale_rule="unbiased")
    packed = run_steps(model, cache)
    expected = run_steps(model, decoded_twin(reference, model.config))
    error = float((packed - expected).norm() / expected.norm())
    tolerance = TOLERANCE.get(model.dtype, TOLERANCE[torch.float32])
    if not error <= tolerance:
        raise TurboQuantError(
            f"{type(model).__name__} gives other logits over packed pages than over the same vectors decoded: "
            f"relative error {error:.3g}, allowed {tolerance:.3g}. It is left as it was; verify=False skips this check"
        )
    return error, tolerance
