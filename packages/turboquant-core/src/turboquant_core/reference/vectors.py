"""Encode, decode and score packed vectors."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ..arguments import check_device, check_tensors
from ..codec import Codec
from ..layout import RowLayout
from ..packing import pack_checked_codes, unpack_codes
from ..provider import Packed
from ..rotated import rotate_vectors
from ..rotation import rotate, unrotate


def encode(x: Tensor, codec: Codec, name: str = "x") -> Packed:
    """Centre, rotate, quantize, pack.

    Args:
        x: float ``[..., head_dim]``; ``[..., kv_heads, head_dim]`` when the codec has a centre.
        codec: how.
        name: of ``x`` in errors.

    Returns:
        Packed rows. A vector with a NaN or infinite coordinate gets codes 0 and scale NaN, a zero vector scale 0;
        neither affects any other vector.

    Raises:
        ValueError: wrong dtype or shape, or ``x`` is on another device than the codec.
    """
    check_vectors(x, codec, name)
    _check_rows_of_center(x, codec, name)
    vectors = rotate_vectors(x, codec.signs, codec.center)
    codes = codec.codes_of(vectors.unit_variance())
    scale = vectors.stored_scale(codec.levels_of(codes), codec.scale_rule)
    codes = torch.where(vectors.finite, codes, torch.zeros_like(codes))
    return Packed(pack_checked_codes(codes, codec.layout), scale)


def decode_rotated(packed: Packed, codec: Codec) -> Tensor:
    """Scale times levels, still rotated and centred: float32 ``[..., head_dim]``."""
    levels = codec.levels_of(unpack_codes(packed.codes, codec.layout))
    return levels * packed.scales.to(torch.float32).unsqueeze(-1)


def decode(packed: Packed, codec: Codec, dtype: torch.dtype) -> Tensor:
    """Unpack, dequantize, unrotate, add the centre back: ``[..., head_dim]`` of ``dtype``.

    Raises:
        ValueError: codes or scales have the wrong dtype or shape.
    """
    check_packed(packed, codec)
    x = unrotate(decode_rotated(packed, codec), codec.signs)
    return (x if codec.center is None else x + codec.center).to(dtype)


def scores(query: Tensor, packed: Packed, codec: Codec, scaling: float) -> Tensor:
    """``scaling * Q K^T`` float32 ``[..., q_len, kv_len]``: the query is rotated, the keys are not decoded.

    Raises:
        ValueError: wrong dtype or shape.
    """
    check_vectors(query, codec, "query")
    check_packed(packed, codec)
    rotated = rotate(query.to(torch.float32), codec.signs)
    return scaling * (rotated @ decode_rotated(packed, codec).transpose(-1, -2))


class VectorCodec(Protocol):
    """What :func:`check_vectors` asks of a codec."""

    @property
    def layout(self) -> RowLayout:
        """Layout of a packed vector."""

    @property
    def device(self) -> torch.device:
        """Device of the codec's tensors."""

    @property
    def center(self) -> Tensor | None:
        """float32 ``[kv_heads, head_dim]``, or None."""


def check_vectors(x: Tensor, codec: VectorCodec, name: str) -> None:
    """Raise ``ValueError`` unless ``x`` is float ``[..., head_dim]`` on the codec's device."""
    head_dim = codec.layout.head_dim
    check_tensors(**{name: x})
    if not x.is_floating_point():
        raise ValueError(f"{name} is {x.dtype}; it must be a floating-point tensor")
    if x.dim() == 0 or x.shape[-1] != head_dim:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; the last dimension must be head_dim = {head_dim}")
    check_device(codec.device, "the codec", **{name: x})


def _check_rows_of_center(x: Tensor, codec: Codec, name: str) -> None:
    if codec.center is not None and (x.dim() < 2 or x.shape[-2] != codec.center.shape[0]):
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}; with a centre it must be [..., kv_heads = {codec.center.shape[0]}, "
            f"head_dim = {codec.layout.head_dim}]"
        )


def check_packed(packed: Packed, codec: Codec) -> None:
    """Raise ``ValueError`` unless scales are fp16 of the codes' leading shape, both on the codec's device."""
    check_device(codec.device, "the codec", codes=packed.codes, scales=packed.scales)
    if packed.scales.dtype != torch.float16 or packed.scales.shape != packed.codes.shape[:-1]:
        raise ValueError(
            f"scales are {packed.scales.dtype} {tuple(packed.scales.shape)}; codes of shape "
            f"{tuple(packed.codes.shape)} need torch.float16 {tuple(packed.codes.shape[:-1])}"
        )
