"""What packing will do with each layer of a model, found by running a few tokens rather than by a list of names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeAlias, get_args

from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .arguments import check_model
from .cache import TurboQuantCache
from .check_steps import run_steps
from .compat import PreTrainedModel
from .packed_layer import PackedLayer
from .patch import patch_model, unpatch_model
from .prompts import is_watched
from .registration import check_attention, why_not_registered
from .summary import LayerSummary

Key: TypeAlias = Literal[
    "compatible",
    "head_dim",
    "eligible_layers",
    "rope_detected",
    "unsupported_features",
    "vision_layers_skipped",
    "known_compatible",
    "not_registered",
    "layers",
]
KEYS: tuple[Key, ...] = get_args(Key)


class Compatibility(Mapping[str, Any]):
    """A report with these keys; ``print`` gives a table. The first seven are those of fused-turboquant.

    ========================= ======================================================================================
    ``compatible``            bool: every packed layer reads packed pages (fused or intercepted)
    ``head_dim``              int: coordinates of a key; the largest where layers differ; 0 if nothing was packed
    ``eligible_layers``       int: layers that are packed
    ``rope_detected``         bool: the model rotates queries and keys; it makes no difference here
    ``unsupported_features``  list of str: why calls were decoded or layers left uncompressed
    ``vision_layers_skipped`` int: attention layers of a vision tower, which has no cache
    ``known_compatible``      bool: Transformers knows the model as a causal one
    ``not_registered``        str or None: why :func:`patch_model` leaves the model untouched
    ``layers``                dict: each layer's :class:`LayerSummary` by index: path, bits, reasons
    ========================= ======================================================================================
    """

    def __init__(self, fields: dict[Key, Any]) -> None:
        self._fields = fields

    def __getitem__(self, key: str) -> Any:
        if key not in KEYS:
            raise KeyError(f"{key!r}; the report has {', '.join(KEYS)}")
        return self._fields[key]

    def __iter__(self) -> Iterator[str]:
        return iter(KEYS)

    def __len__(self) -> int:
        return len(KEYS)

    @property
    def layers(self) -> dict[int, LayerSummary]:
        """Layers by index, each with its path (fused | intercepted | decoded | uncompressed) and why."""
        return self["layers"]  # type: ignore[no-any-return]

    def __str__(self) -> str:
        lines = [f"{index:>5}  {layer.path:<24}{'; '.join(layer.reasons)}" for index, layer in self.layers.items()]
        reason = self["not_registered"]
        head = "" if reason is None else f"left untouched: {reason}\n"
        return head + "\n".join([f"{'layer':>5}  {'path':<24}reason", *lines])


def check_model_compatibility(model: PreTrainedModel, **options: Any) -> Compatibility:
    """Patch ``model``, run a short left-padded batch, report each layer, and leave the model as it was.

    Args:
        model: a decoder or an encoder-decoder, patched or not.
        options: of :class:`TurboQuantCache`: ``bits``, ``compress_v`` and so on.

    Raises:
        LayoutError: a layer's head_dim cannot be packed; names the layer.
        ValueError: ``model`` is none, an option is out of range, no layer can be packed, or the model's attention
            implementation is neither ``sdpa`` nor ``eager``.
        TurboQuantError: the model fails on the batch.
        TypeError: there is no such option.
    """
    model = check_model(model)
    check_attention(model)
    cache = TurboQuantCache(model.config, **options)
    was_patched = is_watched(model)
    patch_model(model, verify=False)
    try:
        run_steps(model, cache)
    finally:
        if not was_patched:
            unpatch_model(model)
    return _report(model, cache)


def _report(model: PreTrainedModel, cache: TurboQuantCache) -> Compatibility:
    layers = {layer.layer_idx: layer for layer in cache.summary().layers}
    packed = [layer for layer in cache.layers if isinstance(layer, PackedLayer)]
    head_dims = [layer.store.layout.key.head_dim for layer in packed if layer.store is not None]
    paths = [layers[layer.layer_idx].path for layer in packed]
    return Compatibility(
        {
            "compatible": bool(head_dims) and not any("decoded" in path for path in paths),
            "head_dim": max(head_dims, default=0),
            "eligible_layers": len(packed),
            "rope_detected": _has_rope(model.config.get_text_config(decoder=True)),
            "unsupported_features": _features(layers),
            "vision_layers_skipped": _vision_layers(model.config),
            "known_compatible": model.config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
            "not_registered": why_not_registered(model),
            "layers": layers,
        }
    )


def _features(layers: dict[int, LayerSummary]) -> list[str]:
    """Reasons without their counts, each once, in the order of layers."""
    reasons = (reason.rsplit(" (", 1)[0] for layer in layers.values() for reason in layer.reasons)
    return list(dict.fromkeys(reasons))


def _has_rope(config: PreTrainedConfig) -> bool:
    names = ("rope_parameters", "rope_theta", "rotary_dim", "rotary_pct", "rotary_emb_base")
    return any(getattr(config, name, None) for name in names)


def _vision_layers(config: PreTrainedConfig) -> int:
    vision = getattr(config, "vision_config", None)
    sizes = (getattr(vision, name, None) for name in ("num_hidden_layers", "depth"))
    return next((size for size in sizes if isinstance(size, int)), 0)
