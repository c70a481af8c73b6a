"""Fresh random pages, queries and lengths for one conformance case."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..codec import CacheCodec, Codec
from ..halves import by_part, joined
from ..layout import ExactRows, PageLayout, RawLayout, VectorLayout
from ..packing import unpack_codes
from ..provider import Packed
from ..reference import ReferenceProvider
from ..scale import MULTIPLIERS, ScaleRule, to_stored, vector_scale
from ..slots import slots_at

SEARCH_TOLERANCE = 1e-6
"""Difference of two cosines that providers may round to either sign."""
NAN_BYTE = 0xFF
"""Bytes 0xFF read as fp16 are NaN: an unmasked read of an unwritten slot shows."""


@dataclass(frozen=True, slots=True)
class PagedCase:
    """Packed pages of several sequences whose unwritten bytes are NaN.

    Attributes:
        codec: codecs of the pages.
        pages: uint8 ``codec.layout.pages_shape(num_pages)``.
        block_table: int32 ``[batch, max_pages]``; pages in random order.
        seq_lens: int32 ``[batch]``.
        key: ``[sum(lengths), kv_heads, head_dim]``, what was stored.
        value: ``[sum(lengths), kv_heads, value_head_dim]``.
        slots: int64 ``[sum(lengths)]``.
    """

    codec: CacheCodec
    pages: Tensor
    block_table: Tensor
    seq_lens: Tensor
    key: Tensor
    value: Tensor
    slots: Tensor

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        return [int(n) for n in self.seq_lens]


def random_vectors(generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Gaussian vectors with unequal channels, a constant offset and norms over two orders of magnitude."""
    x = torch.randn(shape, generator=generator)
    channel = torch.rand(shape[-1:], generator=generator) * 2 + 0.1
    offset = torch.randn(shape[-1:], generator=generator)
    size = torch.exp(torch.randn((*shape[:-1], 1), generator=generator) * 1.2)
    return ((x * channel + offset) * size).to(dtype)


def page_layout(
    key_bits: float,
    value_bits: float | None,
    head_dim: int,
    *,
    value_head_dim: int | None = None,
    page_size: int = 16,
    kv_heads: int = 2,
    itemsize: int = 2,
    exact: ExactRows = ExactRows(),  # noqa: B008 (immutable)
) -> PageLayout:
    """A page layout in the default forms; ``value_bits=None`` keeps values of ``itemsize`` bytes a coordinate."""
    dim = value_head_dim or head_dim
    value = RawLayout(dim, itemsize) if value_bits is None else VectorLayout(dim, value_bits, "cubic")
    return PageLayout(VectorLayout(head_dim, key_bits, "int8"), value, page_size, kv_heads, exact)


def paged_case(
    layout: PageLayout,
    lengths: list[int],
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    seed: int = 0,
    key_scale: ScaleRule = "unbiased",
    center: Tensor | None = None,
) -> PagedCase:
    """Store random keys and values of ``lengths`` tokens through the reference, on the CPU, then move."""
    generator = torch.Generator().manual_seed(seed)
    codec = CacheCodec.create(layout, seed=seed, key_scale=key_scale, center=center)
    block_table, num_pages = _random_block_table(layout, lengths, generator)
    total = sum(lengths)
    key = random_vectors(generator, (total, layout.kv_heads, layout.key.head_dim), dtype)
    value = random_vectors(generator, (total, layout.kv_heads, layout.value.head_dim), dtype)
    slots = slots_of(block_table, lengths, layout.page_size)
    pages = torch.full(layout.pages_shape(num_pages), NAN_BYTE, dtype=torch.uint8)
    ReferenceProvider().store(key, value, pages, slots, codec)
    if layout.exact.rows:
        ReferenceProvider().store_exact(key, value, pages, slots, layout)
    return PagedCase(
        codec=codec.to(device),
        pages=pages.to(device),
        block_table=block_table.to(device),
        seq_lens=torch.tensor(lengths, dtype=torch.int32, device=device),
        key=key.to(device),
        value=value.to(device),
        slots=slots.to(device),
    )


def _random_block_table(layout: PageLayout, lengths: list[int], generator: torch.Generator) -> tuple[Tensor, int]:
    needed = [layout.pages_for(n) for n in lengths]
    order = torch.randperm(sum(needed) + 1, generator=generator).to(torch.int32)
    table = torch.zeros((len(lengths), max([*needed, 1])), dtype=torch.int32)
    first = 0
    for row, count in enumerate(needed):
        table[row, :count] = order[first : first + count]
        first += count
    return table, sum(needed) + 1


def slots_of(block_table: Tensor, lengths: list[int], page_size: int) -> Tensor:
    """Slots int64 ``[sum(lengths)]`` of the tokens of each sequence, in order."""
    position = [torch.arange(length, device=block_table.device) for length in lengths]
    rows = [slots_at(row, own, page_size) for row, own in zip(block_table, position, strict=True)]
    return torch.cat(rows) if rows else torch.empty(0, dtype=torch.int64)


def boundary_distance(unit: Tensor, codec: Codec) -> Tensor:
    """Distance of each coordinate of unit variance to the nearest boundary of its own width, ``[..., head_dim]``."""
    parts = zip(by_part(unit, codec.layout), codec.tables, strict=True)
    return joined([(own.unsqueeze(-1) - boundaries).abs().amin(-1) for own, (_, boundaries) in parts])


def code_distance(unit: Tensor, codec: Codec) -> Tensor:
    """How far each coordinate of unit variance is from another code than the reference's, ``[..., head_dim]``.

    With the rule ``searched`` the nearest boundary for any multiplier, and 0 where rounding decides between two.
    """
    if codec.scale_rule != "searched":
        return boundary_distance(unit, codec)
    distance = torch.stack([boundary_distance(unit * m, codec) for m in MULTIPLIERS]).amin(0)
    codes = torch.stack([codec.nearest_codes(unit * m) for m in MULTIPLIERS])
    cosine = torch.cosine_similarity(codec.levels_of(codes).double(), unit.double().expand(codes.shape), -1)
    best = cosine.argmax(0, keepdim=True)
    same = (codes == codes.gather(0, best.unsqueeze(-1).expand(1, *codes.shape[1:]))).all(-1)
    rival = cosine.masked_fill(same, -1).amax(0)
    undecided = rival >= cosine.amax(0) - SEARCH_TOLERANCE
    return distance.masked_fill(undecided.unsqueeze(-1), 0)


def expected_scales(packed: Packed, reference: Packed, rotated: Tensor, codec: Codec) -> Tensor:
    """Scales fp16 ``[...]`` that belong to the codes of ``packed``.

    The reference's where the codes of a vector are the reference's; of other codes, which rounding may choose
    (:func:`code_distance`), what the codec's rule gives for ``rotated`` ``[..., head_dim]``.
    """
    own = vector_scale(rotated, codec.levels_of(unpack_codes(packed.codes, codec.layout)), codec.scale_rule)
    same = (packed.codes == reference.codes).all(-1)
    return torch.where(same, reference.scales, to_stored(own))


def random_query(case: PagedCase, tokens: int, group_size: int, dtype: torch.dtype, *, seed: int = 1) -> Tensor:
    """Gaussian queries ``[tokens, kv_heads * group_size, head_dim]`` on the case's device."""
    generator = torch.Generator().manual_seed(seed)
    shape = (tokens, case.codec.layout.kv_heads * group_size, case.codec.layout.key.head_dim)
    # Small, so that many tokens get weight: keys have norms over two orders of magnitude.
    return (0.3 * torch.randn(shape, generator=generator)).to(dtype).to(case.pages.device)
