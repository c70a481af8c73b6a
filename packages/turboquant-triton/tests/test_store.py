"""Keys and values into pages: the bytes that encode gives, in their slots, and no other byte."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from turboquant_core import CacheCodec, PageLayout, VectorLayout
from turboquant_core.reference.pages import field_views
from turboquant_core.testing.cases import page_layout, random_vectors
from turboquant_triton.kernels.encode import encode
from turboquant_triton.kernels.store import store

HEAD_DIMS = (64, 80, 96, 112, 128, 160, 192, 256)
PAIRS = ((4, 4), (3, 2), (2, 3), (4, 2))
PAGES = 3


def random_pages(layout: PageLayout, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(8)
    return torch.randint(0, 256, layout.pages_shape(PAGES), dtype=torch.uint8, generator=generator).to(device)


def random_input(
    layout: PageLayout, tokens: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and slots, some of them -1."""
    generator = torch.Generator().manual_seed(9)
    key = random_vectors(generator, (tokens, layout.kv_heads, layout.key.head_dim), dtype)
    value = random_vectors(generator, (tokens, layout.kv_heads, layout.value.head_dim), dtype)
    slots = torch.randperm(PAGES * layout.page_size, generator=generator)[:tokens]
    slots[2::4] = -1
    return key.to(device), value.to(device), slots.to(device)


def by_encode(pages: Tensor, key: Tensor, value: Tensor, slots: Tensor, codec: CacheCodec) -> Tensor:
    """The pages that ``encode`` implies, placed by the reference's views."""
    pages, keep = pages.clone(), slots >= 0
    page, offset = slots[keep] // codec.layout.page_size, slots[keep] % codec.layout.page_size
    fields = field_views(pages, codec.layout)
    for view, x, half in ((fields[0], key, codec.key), (fields[1], value, codec.value)):
        if half is None:
            view.codes[page, :, offset] = x[keep].contiguous().view(torch.uint8)
        else:
            view.codes[page, :, offset], view.scales[page, :, offset] = encode(x[keep], half)
    return pages


def check(layout: PageLayout, dtype: torch.dtype, device: torch.device, tokens: int = 9, **options: Any) -> None:
    """Two KV heads of 9 tokens are more rows than a program takes, of 7 fewer."""
    codec = CacheCodec.create(layout, device=device, **options)
    pages = random_pages(layout, device)
    key, value, slots = random_input(layout, tokens, dtype, device)
    expected = by_encode(pages, key, value, slots, codec)
    store(key, value, pages, slots, codec)
    assert torch.equal(pages, expected)


@pytest.mark.parametrize(("key_bits", "value_bits"), PAIRS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_head_dim(head_dim: int, key_bits: int, value_bits: int, device: torch.device) -> None:
    check(page_layout(key_bits, value_bits, head_dim), torch.float16, device, tokens=7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("key_bits", "value_bits"), PAIRS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_dtype_of_nearest_codes(
    head_dim: int, key_bits: int, value_bits: int, dtype: torch.dtype, device: torch.device
) -> None:
    layout = page_layout(key_bits, value_bits, head_dim)
    check(layout, dtype, device, tokens=7, key_scale="unbiased", value_scale="unbiased")


@pytest.mark.parametrize(("key_bits", "value_bits"), [(2.5, 3.5), (3.5, 4), (3, 2.5), (3.5, None)])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 160, 192, 256])
def test_two_widths(head_dim: int, key_bits: float, value_bits: float | None, device: torch.device) -> None:
    check(page_layout(key_bits, value_bits, head_dim), torch.float16, device, tokens=7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [64, 80])
def test_values_in_full_precision(head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    check(page_layout(4, None, head_dim, itemsize=dtype.itemsize), dtype, device)


@pytest.mark.parametrize(("head_dim", "value_head_dim"), [(128, 64), (64, 128), (192, 80), (16, 256)])
def test_two_head_dims(head_dim: int, value_head_dim: int, device: torch.device) -> None:
    check(page_layout(4, 3, head_dim, value_head_dim=value_head_dim), torch.float16, device)


@pytest.mark.parametrize("page_size", [16, 48, 64])
@pytest.mark.parametrize("kv_heads", [1, 3])
def test_page_sizes_and_heads(page_size: int, kv_heads: int, device: torch.device) -> None:
    check(page_layout(4, 4, 64, page_size=page_size, kv_heads=kv_heads), torch.float16, device)


def test_center_is_of_the_keys_alone(device: torch.device) -> None:
    check(page_layout(4, 4, 64), torch.float16, device, center=torch.randn(2, 64) * 3)


def test_other_forms(device: torch.device) -> None:
    layout = PageLayout(VectorLayout(64, 4, "cubic"), VectorLayout(64, 4, "int8"), page_size=16, kv_heads=2)
    check(layout, torch.float16, device)


@pytest.mark.parametrize("slot_dtype", [torch.int32, torch.int64], ids=str)
def test_strided_input(slot_dtype: torch.dtype, device: torch.device) -> None:
    """Keys and values as slices of one projection, slots as every second entry."""
    layout = page_layout(4, 4, 64)
    codec = CacheCodec.create(layout, device=device)
    pages = random_pages(layout, device)
    key, value, slots = random_input(layout, 9, torch.float16, device)
    both = torch.cat((key, value), dim=1)
    spread = torch.stack((slots, slots + 1), dim=-1).to(slot_dtype)[:, 0]
    expected = by_encode(pages, key, value, slots, codec)
    store(both[:, :2], both[:, 2:], pages, spread, codec)
    assert torch.equal(pages, expected)


def test_nothing_to_store(device: torch.device) -> None:
    layout = page_layout(4, 4, 64)
    codec = CacheCodec.create(layout, device=device)
    pages = random_pages(layout, device)
    before = pages.clone()
    key, value, slots = random_input(layout, 5, torch.float16, device)
    store(key[:0], value[:0], pages, slots[:0], codec)
    store(key, value, pages, torch.full_like(slots, -1), codec)
    assert torch.equal(pages, before)


@pytest.mark.parametrize("slot", [-2, PAGES * 16])
def test_slots_outside_the_pages(slot: int, device: torch.device) -> None:
    layout = page_layout(4, 4, 64)
    codec = CacheCodec.create(layout, device=device)
    pages = random_pages(layout, device)
    before = pages.clone()
    key, value, slots = random_input(layout, 1, torch.float16, device)
    slots[0] = slot
    if device.type == "cpu":
        with pytest.raises(ValueError, match="slots 0 to 47"):
            store(key, value, pages, slots, codec)
    else:
        store(key, value, pages, slots, codec)
    assert torch.equal(pages, before)


def test_wrong_input_is_refused(device: torch.device) -> None:
    layout = page_layout(4, 4, 64)
    codec = CacheCodec.create(layout, device=device)
    pages = random_pages(layout, device)
    key, value, slots = random_input(layout, 5, torch.float16, device)
    with pytest.raises(ValueError, match="key is"):
        store(key[:, :1], value, pages, slots, codec)
    with pytest.raises(ValueError, match="value is"):
        store(key, value[..., :32], pages, slots, codec)
    with pytest.raises(ValueError, match="slot_mapping is"):
        store(key, value, pages, slots.float(), codec)
    with pytest.raises(ValueError, match="contiguous"):
        store(key, value, pages[..., 1:], slots, codec)
    raw = CacheCodec.create(page_layout(4, None, 64), device=device)
    with pytest.raises(ValueError, match="raw layout"):
        store(key.float(), value.float(), random_pages(raw.layout, device), slots, raw)
