"""What the keys or values of one layer look like to the codec."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..codec import KEY_STREAM, VALUE_STREAM, Codec
from ..layout import BITS, VectorLayout
from ..reference import ReferenceProvider
from ..rotated import rotate_vectors
from ..scale import CACHE_RULE

_TINY = torch.finfo(torch.float32).tiny


def offset_bits(vectors: Tensor) -> Tensor:
    """Bits of precision that an offset shared by all tokens costs, float32 ``[heads]``.

    ``log2(1 / (1 - share)) / 2`` with the share of the energy that lies in the mean; at most 12.

    Args:
        vectors: float ``[heads, tokens, head_dim]``.
    """
    vectors = vectors.float()
    energy = vectors.square().sum(-1).mean(1).clamp(min=_TINY)
    share = vectors.mean(1).square().sum(-1) / energy
    return -0.5 * torch.log2((1 - share).clamp(min=2.0**-24))


@dataclass(frozen=True, slots=True)
class HeadStatistics:
    """One KV head of one layer, on one text.

    Attributes:
        offset_bits: see :func:`offset_bits`.
        kurtosis: excess kurtosis of the rotated coordinates over their vector's root mean square; 0 for a Gaussian,
            which the codebooks are made for.
        norm_spread: 99th percentile of the norms over their median.
        first_norm: norm of the first token over the median: far from 1 where the model has an attention sink.
        errors: squared error of the codec at each width over the energy around the mean, by bits.
    """

    offset_bits: float
    kurtosis: float
    norm_spread: float
    first_norm: float
    errors: dict[float, float]


def describe(vectors: Tensor, codec_of: dict[float, Codec]) -> list[HeadStatistics]:
    """Statistics of each head of float ``[heads, tokens, head_dim]``; codecs by bits from :func:`codecs`."""
    offsets = offset_bits(vectors)
    return [_describe(head, float(offset), codec_of) for head, offset in zip(vectors.float(), offsets, strict=True)]


def codecs(head_dim: int, *, keys: bool, device: torch.device) -> dict[float, Codec]:
    """The format's codec of keys or of values for each width that packs ``head_dim``."""
    form, stream = ("int8", KEY_STREAM) if keys else ("cubic", VALUE_STREAM)
    widths = [bits for bits in BITS if isinstance(bits, int) or head_dim % 16 == 0]
    return {
        bits: Codec.create(VectorLayout(head_dim, bits, form), stream=stream, scale_rule=CACHE_RULE, device=device)  # type: ignore[arg-type]
        for bits in widths
    }


def _describe(vectors: Tensor, offset: float, codec_of: dict[float, Codec]) -> HeadStatistics:
    norms = vectors.norm(dim=-1)
    median = norms.median().clamp(min=_TINY)
    signs = next(iter(codec_of.values())).signs
    unit = rotate_vectors(vectors, signs).unit_variance()
    spread = (vectors - vectors.mean(0)).square().sum().clamp(min=_TINY)
    errors = {
        bits: float((round_trip(vectors, codec) - vectors).square().sum() / spread) for bits, codec in codec_of.items()
    }
    return HeadStatistics(
        offset_bits=offset,
        kurtosis=float(unit.pow(4).mean()) - 3,
        norm_spread=float(norms.quantile(0.99) / median),
        first_norm=float(norms[0] / median),
        errors=errors,
    )


def round_trip(vectors: Tensor, codec: Codec) -> Tensor:
    """What packing makes of float ``[..., head_dim]`` (``[..., kv_heads, head_dim]`` with a centre), float32."""
    reference = ReferenceProvider()
    return reference.decode(reference.encode(vectors, codec), codec)
