"""Fixed mean keys from a file: what the keys of each layer lose before they are packed."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from turboquant_core.preset import PresetError, load_preset

from .errors import OptionError

TENSOR_NAME = "key_centers"
"""Float ``[layers, kv_heads, head_dim]``, KV heads of the whole model."""


def read_center(path: Path, layer: int, head_dim: int, kv_heads: int, first_head: int, all_heads: int) -> Tensor | None:
    """Center of this rank's heads of one layer, float32 ``[kv_heads, head_dim]``; None where a preset has none.

    Args:
        path: safetensors file with the tensor :data:`TENSOR_NAME`, or a preset of turboquant-core (``.json``).
        layer: index of the layer.
        head_dim: of the model.
        kv_heads: heads of this rank.
        first_head: where they begin among ``all_heads``.
        all_heads: KV heads of the whole model.

    Raises:
        OptionError: the file cannot be read, or holds another shape.
    """
    if path.suffix == ".json":
        return _of_preset(path, layer, head_dim, kv_heads, first_head, all_heads)
    return _of_tensor(path, layer, head_dim, kv_heads, first_head, all_heads)


def _of_preset(path: Path, layer: int, head_dim: int, kv_heads: int, first_head: int, all_heads: int) -> Tensor | None:
    try:
        preset = load_preset(path)
    except PresetError as error:
        raise OptionError(f"turboquant.key_centers: {error}") from error
    model = preset.model
    if (model.kv_heads, model.head_dim) != (all_heads, head_dim) or layer >= model.layers:
        raise OptionError(
            f"turboquant.preset: {path} is for {model}; this model has layer {layer}, kv_heads = {all_heads}, "
            f"head_dim = {head_dim}: run turboquant doctor on it"
        )
    center = preset.centers.get(layer)
    return None if center is None else center[first_head : first_head + kv_heads]


def _of_tensor(path: Path, layer: int, head_dim: int, kv_heads: int, first_head: int, all_heads: int) -> Tensor:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            centers: Tensor = file.get_tensor(TENSOR_NAME)
    except (OSError, SafetensorError) as error:
        raise OptionError(f"turboquant.key_centers: {path} holds no tensor {TENSOR_NAME!r}: {error}") from error
    if centers.dim() != 3 or layer >= centers.shape[0] or tuple(centers.shape[1:]) != (all_heads, head_dim):
        raise OptionError(
            f"turboquant.key_centers: {path} holds {tuple(centers.shape)}; layer {layer} of this model needs "
            f"[more than {layer} layers, kv_heads = {all_heads}, head_dim = {head_dim}]"
        )
    return centers[layer, first_head : first_head + kv_heads].float()
