"""The same keys and values are the same bytes, whoever packs them."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from example_turboquant_provider import ExampleProvider
from torch import Tensor
from transformers import LlamaConfig

from turboquant_core import (
    CacheCodec,
    PackedPast,
    PageLayout,
    ReferenceProvider,
    TurboQuantKVCache,
    VectorLayout,
    WindowedPast,
)
from turboquant_hf import TurboQuantCache
from turboquant_hf.options import RECENT_TOKENS

BATCH, KV_HEADS, HEAD_DIM, PAGE_SIZE = 2, 2, 64, 16
CONFIG = LlamaConfig(hidden_size=4 * HEAD_DIM, num_attention_heads=4, num_key_value_heads=KV_HEADS, num_hidden_layers=1)
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


def fill(cache: TurboQuantCache, keys: Tensor, values: Tensor) -> WindowedPast:
    """What the one layer of a cache holds after 37 tokens that came in three parts."""
    for part in (slice(0, 20), slice(20, 21), slice(21, 37)):
        cache.update(keys[:, :, part], values[:, :, part], 0)
    return cache.layers[0].past()


def assert_bytes_of_core(past: PackedPast, keys: Tensor, values: Tensor, bits: tuple[int, int]) -> None:
    """Its pages are those that the reference writes of these keys and values, byte for byte."""
    codec = codec_for(bits)
    assert past.codec.layout == codec.layout
    pages = torch.zeros_like(past.pages)
    for sequence, table in enumerate(past.block_table):
        position = torch.arange(past.length)
        slots = table[position // PAGE_SIZE].long() * PAGE_SIZE + position % PAGE_SIZE
        vectors = (x[sequence].transpose(0, 1) for x in (keys, values))
        ReferenceProvider().store(*vectors, pages, slots, codec)
    assert torch.equal(past.pages, pages)


@pytest.mark.parametrize("bits", BITS, ids=str)
def test_the_transformers_cache_stores_the_bytes_of_core(bits: tuple[int, int]) -> None:
    keys, values = keys_and_values(37)
    cache = TurboQuantCache(CONFIG, bits, page_size=PAGE_SIZE, provider="reference", recent_tokens=0)
    assert_bytes_of_core(fill(cache, keys, values).packed, keys, values, bits)


@pytest.mark.parametrize("bits", BITS, ids=str)
def test_by_default_all_but_the_recent_tokens_are_the_bytes_of_core(bits: tuple[int, int]) -> None:
    keys, values = keys_and_values(37)
    past = fill(TurboQuantCache(CONFIG, bits, page_size=PAGE_SIZE, provider="reference"), keys, values)
    packed = 37 - RECENT_TOKENS
    assert past.packed.length == packed
    assert_bytes_of_core(past.packed, keys[:, :, :packed], values[:, :, :packed], bits)
    for have, want in zip(past.read(packed, 37, torch.float32), (keys, values), strict=True):
        assert torch.equal(have, want[:, :, packed:])


@pytest.mark.parametrize("bits", BITS, ids=str)
def test_the_two_caches_decode_alike(bits: tuple[int, int]) -> None:
    keys, values = keys_and_values(37)
    core = TurboQuantKVCache(BATCH, KV_HEADS, HEAD_DIM, bits, provider="reference")
    core.append(keys, values)
    cache = TurboQuantCache(CONFIG, bits, provider="reference", recent_tokens=0)
    cache.update(keys, values, 0)
    got = cache.layers[0].store.past().read(0, 37, torch.float32)
    for have, want in zip(got, core.read(), strict=True):
        assert torch.equal(have, want)
