"""What packing will do with each layer of a model, found by running a few tokens rather than by a list of names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .cache import TurboQuantCache
from .compat import PreTrainedModel
from .patch import patch_model, unpatch_model
from .prompts import is_watched
from .registration import check_attention, why_not_registered
from .summary import LayerSummary
from .verify import run_steps


class Compatibility(Mapping[int, LayerSummary]):
    """Layers by index, each with its path (fused | intercepted | decoded | uncompressed); ``print`` it.

    Attributes:
        not_registered: why the model is left untouched by :func:`patch_model`; None when it is switched by name.
    """

    def __init__(self, layers: tuple[LayerSummary, ...], not_registered: str | None) -> None:
        self._layers = {layer.layer_idx: layer for layer in layers}
        self.not_registered = not_registered

    def __getitem__(self, layer_idx: int) -> LayerSummary:
        return self._layers[layer_idx]

    def __iter__(self) -> Iterator[int]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __str__(self) -> str:
        lines = [f"{index:>5}  {layer.path:<24}{'; '.join(layer.reasons)}" for index, layer in self.items()]
        head = "" if self.not_registered is None else f"left untouched: {self.not_registered}\n"
        return head + "\n".join([f"{'layer':>5}  {'path':<24}reason", *lines])


def check_model_compatibility(model: PreTrainedModel, **options: Any) -> Compatibility:
    """Patch ``model``, run a short left-padded batch, report each layer, and leave the model as it was.

    Args:
        model: a decoder, patched or not.
        options: of :class:`TurboQuantCache`: ``bits``, ``compress_v`` and so on.

    Raises:
        LayoutError: a layer's head_dim cannot be packed; names the layer.
        ValueError: an option is out of range, no layer can be packed, or the model's attention implementation is
            neither ``sdpa`` nor ``eager``.
    """
    check_attention(model)
    cache = TurboQuantCache(model.config, **options)
    was_patched = is_watched(model)
    patch_model(model, verify=False)
    try:
        run_steps(model, cache)
    finally:
        if not was_patched:
            unpatch_model(model)
    return Compatibility(cache.summary().layers, why_not_registered(model))
