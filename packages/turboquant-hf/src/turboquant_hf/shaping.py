"""Shaped codes of prompts: what a model's queries and output projections say about errors, measured on a text.

The search of :mod:`turboquant_core.shaping` takes some 128 steps of small operations three times over, however few the
vectors: prompts pay it once, single tokens would pay it at every step. Tokens of short calls keep the plain codes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from turboquant_core import CacheCodec, KernelProvider, ReferenceProvider, TurboQuantError
from turboquant_core.shaping import output_moment, query_moment, shaped

from .arguments import check_ids, check_model
from .compat import CACHE_ARGUMENT, DynamicCache, PreTrainedModel

SHAPED_TOKENS = 16
"""Tokens of each sequence in a call from which on their codes are shaped."""
PROJECTIONS = ("o_proj", "out_proj", "c_proj", "dense", "wo")
"""Names that models give the output projection of attention."""


@dataclass(frozen=True, slots=True, eq=False)
class Shaping:
    """Weights of errors by layer, float32 ``[kv_heads, head_dim, head_dim]``; see :func:`measure_shaping`.

    Attributes:
        keys: second moments of the queries.
        values: second moments of the output projection's rows.
    """

    keys: Mapping[int, Tensor]
    values: Mapping[int, Tensor]

    def codec(self, layer_idx: int, codec: CacheCodec) -> CacheCodec:
        """``codec`` with shaped codes; the same bytes to every reader.

        Raises:
            ValueError: there are no weights for the layer, or they do not fit it.
        """
        if layer_idx not in self.keys or layer_idx not in self.values:
            raise ValueError(f"shaped has no weights for layer {layer_idx}; it has {sorted(self.keys)}")
        key = shaped(codec.key, self.keys[layer_idx].to(codec.key.device))
        value = None if codec.value is None else shaped(codec.value, self.values[layer_idx].to(codec.key.device))
        return replace(codec, key=key, value=value)

    def provider(self, layer_idx: int, codec: CacheCodec, provider: KernelProvider, batch: int) -> KernelProvider:
        """``provider`` for a layer of ``batch`` sequences, which shapes the codes of long calls.

        Raises:
            ValueError: see :meth:`codec`.
        """
        shaping: Any = ShapedStore(provider, self.codec(layer_idx, codec), SHAPED_TOKENS * batch)
        return cast("KernelProvider", shaping)


class ShapedStore:
    """A provider whose :meth:`store` shapes the codes of long calls, in PyTorch on any device.

    Args:
        provider: does everything else.
        codec: shaped, of the same pages.
        least: tokens of a call, all sequences together, from which on it shapes.
    """

    def __init__(self, provider: KernelProvider, codec: CacheCodec, least: int) -> None:
        self._provider, self._codec, self._least = provider, codec, least
        self._reference = ReferenceProvider()

    def __getattr__(self, name: str) -> Any:
        # Copies are made before the attributes are there.
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._provider, name)

    def store(self, key: Tensor, value: Tensor, pages: Tensor, slot_mapping: Tensor, codec: CacheCodec) -> None:
        """See :meth:`KernelProvider.store`."""
        if len(slot_mapping) >= self._least:
            self._reference.store(key, value, pages, slot_mapping, self._codec)
        else:
            self._provider.store(key, value, pages, slot_mapping, codec)


@dataclass(slots=True)
class _Seen:
    """One layer's calls."""

    kv_heads: int
    head_dim: int
    query_heads: int = 0
    moment: Tensor | None = None


@dataclass(eq=False)
class _Watch(TorchFunctionMode):
    """Sees the queries of attention, after the layer of each call was named by its cache."""

    seen: dict[int, _Seen] = field(default_factory=dict)
    layer: int | None = None

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention and self.layer is not None:
            query = args[0] if args else (kwargs or {})["query"]
            own, self.layer = self.seen[self.layer], None
            own.query_heads, own.moment = query.shape[1], query_moment(query, own.kv_heads)
        return func(*args, **(kwargs or {}))

    def around(self, index: int, update: Callable[..., Any]) -> Callable[..., Any]:
        """``update`` of a cache layer, which names it."""

        def named(key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.seen[index] = _Seen(key_states.shape[1], value_states.shape[-1])
            self.layer = index
            return update(key_states, value_states, *args, **kwargs)

        return named


@torch.no_grad()
def measure_shaping(model: PreTrainedModel, ids: Tensor) -> Shaping:
    """Weights for ``patch_model(model, shaped=...)``, from one pass in full precision.

    Args:
        model: a decoder that runs ``scaled_dot_product_attention``.
        ids: int64 ``[batch, tokens]`` of real text, a few hundred tokens or more.

    Raises:
        TurboQuantError: a layer's queries or output projection are not found.
        ValueError: ``model`` is no loaded model, or ``ids`` are no token ids.
    """
    model = check_model(model)
    check_ids("ids", ids)
    watch, cache = _Watch(), DynamicCache(config=model.config)
    layers: list[Any] = cache.layers
    for index, layer in enumerate(layers):
        vars(layer)["update"] = watch.around(index, layer.update)
    with watch:
        model(input_ids=ids.to(model.device), use_cache=True, **{CACHE_ARGUMENT: cache})
    unseen = [index for index, own in watch.seen.items() if own.moment is None]
    if unseen or not watch.seen:
        raise TurboQuantError(
            f"{type(model).__name__} showed no queries of layers {unseen}: shaped codes need a model that runs "
            "scaled_dot_product_attention (attn_implementation='sdpa')"
        )
    return Shaping(
        keys={index: own.moment for index, own in watch.seen.items() if own.moment is not None},
        values={
            index: output_moment(_projection(model, index, own.query_heads * own.head_dim), own.kv_heads, own.head_dim)
            for index, own in watch.seen.items()
        },
    )


def _projection(model: PreTrainedModel, layer_idx: int, width: int) -> Tensor:
    """Weight ``[hidden_size, width]`` of the output projection of a layer's attention."""
    for module in model.modules():
        if getattr(module, "layer_idx", None) != layer_idx:
            continue
        for name in PROJECTIONS:
            weight = getattr(getattr(module, name, None), "weight", None)
            if isinstance(weight, Tensor) and weight.is_floating_point() and weight.dim() == 2:
                rows = weight.T if isinstance(getattr(module, name), Conv1D) else weight
                if rows.shape[1] == width:
                    return rows
    raise TurboQuantError(
        f"layer {layer_idx} of {type(model).__name__} has no output projection of {width} inputs in floating point "
        f"(looked for {', '.join(PROJECTIONS)}): shaped codes cannot be made for it"
    )
