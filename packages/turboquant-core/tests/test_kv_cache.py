"""The standalone cache and its store: any chunks, true bytes, crop, select, snapshots, attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from turboquant_core import (
    CacheCodec,
    MemoryFigures,
    PackedSequences,
    PageLayout,
    ReferenceProvider,
    TurboQuantKVCache,
    VectorLayout,
)


def vectors(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def store(batch: int = 2) -> PackedSequences:
    layout = PageLayout(VectorLayout(64, 4, "int8"), VectorLayout(32, 3, "cubic"), page_size=16, kv_heads=2)
    return PackedSequences(batch, CacheCodec.create(layout), ReferenceProvider(), torch.float32)


def test_zeros_appended_to_vectors_change_no_attention() -> None:
    """The way out that the error for another head_dim names: 20 coordinates as the first of 24."""
    query, keys, values = (vectors(1, 2, 50, 20, seed=seed) for seed in range(3))
    cache = TurboQuantKVCache(1, 2, 24, 4)
    cache.append(*(torch.nn.functional.pad(x, (0, 4)) for x in (keys, values)))
    out = cache.attend(torch.nn.functional.pad(query, (0, 4)), scaling=20**-0.5).out
    expected = torch.nn.functional.scaled_dot_product_attention(query, keys, values, is_causal=True)
    assert out[..., 20:].norm() < 0.1 * out.norm()
    assert (out[..., :20] - expected).norm() / expected.norm() < 0.15


@settings(derandomize=True, deadline=None, max_examples=25)
@given(chunks=st.lists(st.integers(0, 40), max_size=6), bits=st.sampled_from([2, 2.5, 3, 3.5, 4, (4, 2), (3.5, 2)]))
def test_chunks_do_not_matter(chunks: list[int], bits: float | tuple[float, float]) -> None:
    keys, values = vectors(2, 3, sum(chunks), 64), vectors(2, 3, sum(chunks), 64, seed=1)
    cache, whole = (TurboQuantKVCache(2, 3, 64, bits) for _ in range(2))
    start = 0
    for chunk in chunks:
        cache.append(keys[:, :, start : start + chunk], values[:, :, start : start + chunk])
        start += chunk
        assert len(cache) == cache.seq_length == start
    whole.append(keys, values)
    for got, expected in zip(cache.read(), whole.read(), strict=True):
        assert torch.equal(got, expected)


def test_memory_figures() -> None:
    cache = TurboQuantKVCache(2, 3, 64, (4, 2), dtype=torch.bfloat16)
    assert cache.memory() == MemoryFigures(0, 0, 0)
    assert cache.memory().compression_ratio == 1.0
    cache.append(vectors(2, 3, 20, 64).bfloat16(), vectors(2, 3, 20, 64).bfloat16())
    figures = cache.memory()
    assert figures.stored == 2 * 3 * 20 * (32 + 2 + 16 + 2)
    assert figures.allocated == 2 * 3 * 32 * (32 + 2 + 16 + 2)
    assert figures.uncompressed == 2 * 3 * 20 * 128 * 2
    assert figures.compression_ratio == pytest.approx(256 / 52)
    cache.reset()
    assert cache.memory() == MemoryFigures(0, 0, 0)


@pytest.mark.parametrize(("bits", "row"), [(2.5, 20 + 2), (3.5, 28 + 2), (4, 32 + 2)])
def test_fractional_bits_in_a_cache(bits: float, row: int) -> None:
    """True bytes, and attention near that over exact vectors: nearer with more bits."""
    cache = TurboQuantKVCache(1, 2, 64, bits)
    keys, values, query = vectors(1, 2, 90, 64), vectors(1, 2, 90, 64, seed=1), vectors(1, 4, 3, 64, seed=2)
    cache.append(keys, values)
    assert cache.memory().stored == 2 * 90 * 2 * row
    expanded = [x.repeat_interleave(2, 1) for x in (keys, values)]
    exact = torch.nn.functional.scaled_dot_product_attention(
        query, *expanded, attn_mask=torch.arange(90) <= torch.arange(87, 90).unsqueeze(1)
    )
    error = (cache.attend(query).out - exact).norm() / exact.norm()
    assert float(error) < {2.5: 0.5, 3.5: 0.27, 4: 0.2}[bits]


def test_growth_copies_a_bounded_number_of_bytes() -> None:
    sequences, copied, last = store(1), 0, 0
    for _ in range(600):
        sequences.append(vectors(1, 2, 1, 64), vectors(1, 2, 1, 32))
        allocated = sequences.memory().allocated
        copied += last if allocated != last else 0
        last = allocated
    assert copied < 20 * last


def test_attention_equals_dense() -> None:
    cache = TurboQuantKVCache(2, 2, 64, 4)
    cache.append(vectors(2, 2, 37, 64), vectors(2, 2, 37, 64, seed=1))
    query = vectors(2, 4, 3, 64, seed=2)
    keys, values = (x.repeat_interleave(2, 1).double() for x in cache.read())
    hidden = torch.arange(37) > torch.arange(34, 37).unsqueeze(1)
    scores = (query.double() @ keys.transpose(-1, -2) * 0.2).masked_fill(hidden, -torch.inf)
    got = cache.attend(query, scaling=0.2)
    torch.testing.assert_close(got.out.double(), scores.softmax(-1) @ values, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.lse.double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-5)


def test_snapshot_survives_growth_crop_and_select() -> None:
    sequences = store()
    sequences.append(vectors(2, 2, 16, 64), vectors(2, 2, 16, 32))
    past = sequences.past()
    before = past.read(0, 16, torch.float32)
    sequences.append(vectors(2, 2, 50, 64, seed=1), vectors(2, 2, 50, 32, seed=1))
    sequences.select(torch.tensor([1, 1, 0]))
    sequences.crop(3)
    assert past.length == 16
    for got, expected in zip(past.read(0, 16, torch.float32), before, strict=True):
        assert torch.equal(got, expected)


def test_select_and_crop() -> None:
    sequences = store()
    sequences.append(vectors(2, 2, 20, 64), vectors(2, 2, 20, 32))
    before = sequences.past().read(0, 20, torch.float32)
    sequences.select(torch.tensor([1, 0, 1]))
    assert sequences.batch == 3
    sequences.crop(18)
    after = sequences.past().read(0, 18, torch.float32)
    for got, expected in zip(after, before, strict=True):
        assert torch.equal(got, expected[[1, 0, 1], :, :18])
    with pytest.raises(ValueError, match="crop to 19"):
        sequences.crop(19)


@pytest.mark.parametrize(
    ("keys", "values", "message"),
    [
        (torch.zeros(2, 2, 3, 32), torch.zeros(2, 2, 3, 32), "keys have shape"),
        (torch.zeros(2, 2, 3, 64), torch.zeros(2, 2, 3, 64), "values have shape"),
        (torch.zeros(2, 2, 3, 64), torch.zeros(2, 2, 4, 32), "tokens must be equal"),
        (torch.zeros(3, 2, 3, 64), torch.zeros(3, 2, 3, 32), "keys have shape"),
        (torch.zeros(2, 2, 3, 64, dtype=torch.int8), torch.zeros(2, 2, 3, 32), "int8"),
    ],
)
def test_bad_append_adds_nothing(keys: torch.Tensor, values: torch.Tensor, message: str) -> None:
    sequences = store()
    with pytest.raises(ValueError, match=message):
        sequences.append(keys, values)
    assert sequences.length == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch": 1.0}, r"batch is 1\.0; it must be an integer of at least 1"),
        ({"batch": True}, "batch is True"),
        ({"kv_heads": 2.0}, r"kv_heads is 2\.0; it must be an integer of at least 1"),
        ({"page_size": 16.0}, r"page_size is 16\.0; it must be an integer"),
        ({"head_dim": 64.0}, r"head_dim is 64\.0; it must be an integer"),
        ({"seed": 1.5}, r"seed is 1\.5; it must be an integer from 0"),
        ({"dtype": "float16"}, "dtype is 'float16'; it must be a torch.dtype"),
    ],
)
def test_arguments_of_another_kind(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TurboQuantKVCache(**{"batch": 1, "kv_heads": 2, "head_dim": 64} | arguments)


def test_lists_are_no_keys() -> None:
    cache = TurboQuantKVCache(1, 1, 64)
    with pytest.raises(ValueError, match=r"keys is a list; it must be a torch\.Tensor"):
        cache.append([[[[0.0] * 64]]], torch.zeros(1, 1, 1, 64))  # type: ignore[arg-type]


def test_other_bad_input() -> None:
    with pytest.raises(ValueError, match="batch is 0"):
        TurboQuantKVCache(0, 2, 64)
    cache = TurboQuantKVCache(1, 2, 64)
    cache.append(vectors(1, 2, 5, 64), vectors(1, 2, 5, 64))
    with pytest.raises(ValueError, match=r"2\.\.6"):
        cache.read(2, 6)
    with pytest.raises(ValueError, match="5 tokens"):
        cache.attend(vectors(1, 2, 6, 64))
