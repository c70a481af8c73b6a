"""Fixed mean keys from a file: what the keys of each layer lose before they are packed."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from .errors import OptionError

TENSOR_NAME = "key_centers"
"""Float ``[layers, kv_heads, head_dim]``, KV heads of the whole model."""


def read_center(path: Path, layer: int, head_dim: int, kv_heads: int, first_head: int, all_heads: int) -> Tensor:
    """Center of this rank's heads of one layer, float32 ``[kv_heads, head_dim]``.

    Args:
        path: safetensors file with the tensor :data:`TENSOR_NAME`.
        layer: index of the layer.
        head_dim: of the model.
        kv_heads: heads of this rank.
        first_head: where they begin among ``all_heads``.
        all_heads: KV heads of the whole model.

    Raises:
        OptionError: the file cannot be read, or holds another shape.
    """
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
