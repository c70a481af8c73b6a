"""Packed vectors against the reference, byte for byte."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from turboquant_core import CacheCodec, Codec, LayoutError, Packed, PageLayout, VectorLayout
from turboquant_core.packing import unpack_codes
from turboquant_core.reference import ReferenceProvider
from turboquant_core.rotation import rotate
from turboquant_core.scale import SCALE_RULES
from turboquant_core.shaping import shaped
from turboquant_core.testing.cases import code_distance, expected_scales, random_vectors
from turboquant_triton import TritonProvider
from turboquant_triton.kernels.encode import encode

HEAD_DIMS = (64, 80, 96, 112, 128, 160, 192, 256)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
BOUNDARY = 1e-4


def vectors(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int = 1) -> Tensor:
    return random_vectors(torch.Generator().manual_seed(seed), shape, dtype).to(device)


def codec_of(head_dim: int, bits: float, form: Any, device: torch.device, **options: Any) -> Codec:
    return Codec.create(VectorLayout(head_dim, bits, form), device=device, **options)


def assert_same(got: Packed, expected: Packed, x: Tensor, codec: Codec) -> None:
    """Equal bytes, but for codes beside a boundary and the scales of their vectors, within an fp16 step or two.

    Beside a boundary is within ``BOUNDARY`` of it, relative to the larger of the coordinate and 1.
    """
    assert got.codes.shape == expected.codes.shape
    assert got.scales.shape == expected.scales.shape
    rotated = rotate(x.double() - (0.0 if codec.center is None else codec.center), codec.signs)
    unit = rotated / rotated.square().mean(-1, keepdim=True).sqrt()
    near_boundary = code_distance(unit, codec) <= BOUNDARY * unit.abs().clamp(min=1)
    differs = unpack_codes(got.codes, codec.layout) != unpack_codes(expected.codes, codec.layout)
    assert not (differs & ~near_boundary).any()
    scales = expected_scales(got, expected, rotated, codec)
    torch.testing.assert_close(got.scales, scales, rtol=2e-3, atol=6e-8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["int8", "cubic"])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_same_bytes_as_the_reference(
    head_dim: int, bits: int, form: Any, dtype: torch.dtype, device: torch.device
) -> None:
    codec = codec_of(head_dim, bits, form, device)
    x = vectors((5, head_dim), dtype, device)
    assert_same(encode(x, codec), ReferenceProvider().encode(x, codec), x, codec)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["int8", "cubic"])
@pytest.mark.parametrize("bits", [2.5, 3.5])
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 160, 192, 256])
def test_two_widths(head_dim: int, bits: float, form: Any, dtype: torch.dtype, device: torch.device) -> None:
    center = torch.randn(2, head_dim) if dtype == torch.float32 else None
    codec = codec_of(head_dim, bits, form, device, center=center)
    x = vectors((3, 2, head_dim), dtype, device)
    x[2, 0, 5], x[1, 1] = torch.nan, 0
    got, expected = encode(x, codec), ReferenceProvider().encode(x, codec)
    bad = got.scales.isnan()
    assert torch.equal(bad, expected.scales.isnan())
    assert torch.equal(got.codes[bad], expected.codes[bad])
    assert_same(Packed(got.codes[0], got.scales[0]), Packed(expected.codes[0], expected.scales[0]), x[0], codec)


@pytest.mark.parametrize("rule", SCALE_RULES)
@pytest.mark.parametrize(("head_dim", "bits"), [(d, b) for d in (64, 80) for b in (2, 3, 4)] + [(64, 2.5), (64, 3.5)])
def test_every_scale_rule(head_dim: int, bits: float, rule: Any, device: torch.device) -> None:
    codec = codec_of(head_dim, bits, "cubic", device, scale_rule=rule)
    x = vectors((4, head_dim), torch.float16, device)
    assert_same(encode(x, codec), ReferenceProvider().encode(x, codec), x, codec)


@pytest.mark.parametrize("form", ["int8", "cubic"])
@pytest.mark.parametrize(
    ("head_dim", "bits"),
    [(d, b) for d in HEAD_DIMS for b in (2, 3, 4)] + [(d, b) for d in (32, 96, 128, 160, 256) for b in (2.5, 3.5)],
)
def test_searched_codes(head_dim: int, bits: float, form: Any, device: torch.device) -> None:
    center = torch.randn(1, head_dim) if bits == 4 else None
    codec = codec_of(head_dim, bits, form, device, scale_rule="searched", center=center)
    x = vectors((15, 1, head_dim), torch.float16, device, seed=head_dim)
    x[3], x[7, 0, 5] = 0, torch.inf
    got, expected = encode(x, codec), ReferenceProvider().encode(x, codec)
    assert torch.equal(got.scales.isnan(), expected.scales.isnan())
    assert torch.equal(got.codes[7], expected.codes[7])
    keep = torch.arange(15, device=device) != 7
    got, expected = (Packed(packed.codes[keep], packed.scales[keep]) for packed in (got, expected))
    assert_same(got, expected, x[keep], codec)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_center(dtype: torch.dtype, device: torch.device) -> None:
    codec = codec_of(80, 4, "int8", device, center=torch.randn(3, 80) * 5)
    x = vectors((2, 4, 3, 80), dtype, device)
    assert_same(encode(x, codec), ReferenceProvider().encode(x, codec), x, codec)


@pytest.mark.parametrize("shape", [(64,), (0, 64), (3, 0, 64), (1, 64), (2, 3, 5, 64), (2, 1, 2, 3, 64), (33, 64)])
def test_any_leading_shape(shape: tuple[int, ...], device: torch.device) -> None:
    codec = codec_of(64, 3, "cubic", device)
    x = vectors(shape, torch.float16, device)
    got, expected = encode(x, codec), ReferenceProvider().encode(x, codec)
    assert got.codes.shape == expected.codes.shape
    assert torch.equal(got.codes, expected.codes)


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 1, 0), (0, 2, 1)])
def test_any_strides(order: tuple[int, int, int], device: torch.device) -> None:
    codec = codec_of(64, 4, "int8", device)
    shape = [0, 0, 0]
    for place, size in zip(order, (5, 3, 64), strict=True):
        shape[place] = size
    x = vectors(tuple(shape), torch.float16, device).permute(order)
    before = x.clone()
    got, expected = encode(x, codec), encode(x.contiguous(), codec)
    assert torch.equal(x, before)
    assert torch.equal(got.codes, expected.codes)
    assert torch.equal(got.scales, expected.scales)


def test_slices_and_broadcasts(device: torch.device) -> None:
    codec = codec_of(64, 2, "int8", device)
    x = vectors((6, 4, 80), torch.float16, device)
    for view in (x[::2, 1:, 8:72], x[:1, :, :64].expand(5, 4, 64), x[:, 0, 16:]):
        got, expected = encode(view, codec), encode(view.contiguous(), codec)
        assert torch.equal(got.codes, expected.codes)
        assert torch.equal(got.scales, expected.scales)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("form", ["int8", "cubic"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bad_vectors_harm_no_other(bits: int, form: Any, dtype: torch.dtype, device: torch.device) -> None:
    codec = codec_of(80, bits, form, device)
    x = vectors((7, 80), dtype, device)
    x[1], x[2, 3], x[3, 0], x[4, 79] = 0, torch.nan, torch.inf, -torch.inf
    got, expected = encode(x, codec), ReferenceProvider().encode(x, codec)
    assert torch.equal(got.codes, expected.codes)
    assert torch.equal(got.scales, expected.scales) or got.scales[2:5].isnan().all()
    keep = [0, 1, 5, 6]
    assert torch.equal(got.scales[keep], expected.scales[keep])
    assert torch.equal(got.scales.isnan(), expected.scales.isnan())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", ["max", "tiny", "smallest_subnormal"])
def test_extreme_sizes(dtype: torch.dtype, size: str, device: torch.device) -> None:
    if dtype == torch.bfloat16 and size != "max" and device.type == "cpu":
        pytest.skip("Triton's interpreter converts subnormal bfloat16 numbers wrongly")
    info = torch.finfo(dtype)
    values = {"max": info.max, "tiny": info.tiny, "smallest_subnormal": 2 * info.tiny * info.eps}
    codec = codec_of(64, 4, "int8", device)
    x = (torch.randn(3, 64).clamp(-2, 2).mul(2).round().div(4) * values[size]).to(device, dtype)
    got, expected = encode(x, codec), ReferenceProvider().encode(x, codec)
    assert_same(got, expected, x, codec)


def test_vectors_with_few_values_share_ties(device: torch.device) -> None:
    """Sums that are exactly zero take the lower code, as everywhere."""
    for bits in (2, 3, 4):
        codec = codec_of(64, bits, "int8", device, scale_rule="least_squares")
        x = torch.eye(64, dtype=torch.float16, device=device)[:3] + torch.eye(64, device=device).half()[3:6]
        got, expected = encode(x, codec), ReferenceProvider().encode(x, codec)
        assert torch.equal(got.codes, expected.codes)
        assert torch.equal(got.scales, expected.scales)


def test_wrong_input_is_refused(device: torch.device) -> None:
    codec = codec_of(64, 4, "int8", device)
    with pytest.raises(ValueError, match="head_dim = 64"):
        encode(torch.zeros(3, 63, device=device), codec)
    with pytest.raises(ValueError, match="floating"):
        encode(torch.zeros(3, 64, dtype=torch.int32, device=device), codec)
    with pytest.raises(LayoutError, match="multiples of 16 up to 256 at 4 bits"):
        encode(torch.zeros(3, 24, device=device), codec_of(24, 4, "int8", device))
    with pytest.raises(LayoutError, match=r"multiples of 32 up to 256 at 2\.5 bits"):
        encode(torch.zeros(3, 80, device=device), codec_of(80, 2.5, "int8", device))
    with pytest.raises(LayoutError, match="multiples of 16 up to 256 at 4 bits"):
        encode(torch.zeros(3, 512, device=device), codec_of(512, 4, "int8", device))


def test_codes_that_need_a_search_are_refused() -> None:
    codec = shaped(Codec.create(VectorLayout(64, 3, "int8")), torch.eye(64).unsqueeze(0))
    with pytest.raises(ValueError, match="provider='reference'"):
        TritonProvider().encode(torch.randn(2, 1, 64), codec)
    layout = PageLayout(codec.layout, codec.layout, 16, 1)
    pages, vectors = torch.zeros(layout.pages_shape(1), dtype=torch.uint8), torch.randn(2, 1, 64)
    with pytest.raises(ValueError, match="provider='reference'"):
        TritonProvider().store(vectors, vectors, pages, torch.arange(2), CacheCodec(layout, codec, codec))
