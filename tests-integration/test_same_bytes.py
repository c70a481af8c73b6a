"""The same keys and values are the same bytes, whoever packs them."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from example_turboquant_provider import ExampleProvider
from torch import Tensor

from turboquant_core import CacheCodec, PageLayout, ReferenceProvider, VectorLayout

BATCH, KV_HEADS, HEAD_DIM, PAGE_SIZE = 2, 2, 64, 16
BITS = [(4, 4), (3, 3), (2, 2), (4, 3)]


def keys_and_values(tokens: int) -> tuple[Tensor, Tensor]:
    """Two float32 tensors ``[batch, kv_heads, tokens, head_dim]``."""
    generator = torch.Generator().manual_seed(tokens)
    both = torch.randn(2, BATCH, KV_HEADS, tokens, HEAD_DIM, generator=generator)
    return both[0], both[1]


def vectors_of(keys: Tensor, values: Tensor, bits: tuple[int, int]) -> list[tuple[Tensor, Tensor]]:
    """Codes and scales of keys and of values, packed one by one with nothing but the codec."""
    codec = codec_for(bits)
    assert codec.value is not None
    reference = ReferenceProvider()
    return [tuple(reference.encode(keys, codec.key)), tuple(reference.encode(values, codec.value))]


def codec_for(bits: tuple[int, int]) -> CacheCodec:
    layout = PageLayout(
        VectorLayout(HEAD_DIM, bits[0], "int8"),
        VectorLayout(HEAD_DIM, bits[1], "cubic"),
        page_size=PAGE_SIZE,
        kv_heads=KV_HEADS,
    )
    return CacheCodec.create(layout)


def fields(pages: Tensor, layout: PageLayout) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Key codes, value codes, key scales and value scales of pages, from the offsets in docs/layout.md."""
    starts = (0, layout.value_offset, layout.key_scale_offset, layout.value_scale_offset, layout.chunk_bytes)
    key, value, key_scale, value_scale = (pages[..., first:last] for first, last in pairwise(starts))
    rows = (*pages.shape[:-1], PAGE_SIZE, -1)
    return key.reshape(rows), value.reshape(rows), key_scale.reshape(rows), value_scale.reshape(rows)


@pytest.mark.parametrize("bits", BITS, ids=str)
@pytest.mark.parametrize("provider", [ReferenceProvider(), ExampleProvider()], ids=lambda provider: provider.name)
def test_a_page_holds_the_bytes_of_the_vectors(bits: tuple[int, int], provider: ReferenceProvider) -> None:
    keys, values = (x[0].transpose(0, 1) for x in keys_and_values(PAGE_SIZE))
    codec = codec_for(bits)
    pages = torch.zeros(codec.layout.pages_shape(1), dtype=torch.uint8)
    provider.store(keys, values, pages, torch.arange(PAGE_SIZE), codec)
    (key, key_scale), (value, value_scale) = vectors_of(keys, values, bits)
    stored = fields(pages[0], codec.layout)
    expected = (key, value, key_scale.unsqueeze(-1).view(torch.uint8), value_scale.unsqueeze(-1).view(torch.uint8))
    for have, want in zip(stored, expected, strict=True):
        assert torch.equal(have, want.transpose(0, 1))
