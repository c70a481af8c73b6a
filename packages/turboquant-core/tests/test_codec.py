"""Codecs: what they hold, how centring works, and what they refuse."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest
import torch

from turboquant_core import (
    CacheCodec,
    Codec,
    LayoutError,
    PageLayout,
    RawLayout,
    ReferenceProvider,
    VectorLayout,
    format_codebook,
    rotation_signs,
)

LAYOUT = VectorLayout(64, 3, "cubic")
PAGE = PageLayout(VectorLayout(64, 4, "int8"), VectorLayout(96, 2, "cubic"), page_size=16, kv_heads=2)


def test_codec_holds_signs_and_codebook() -> None:
    codec = Codec.create(LAYOUT, seed=5, stream=1)
    assert torch.equal(codec.signs, rotation_signs(64, seed=5, stream=1))
    levels, boundaries = format_codebook("cubic", 3).tensors()
    assert torch.equal(codec.levels, levels)
    assert torch.equal(codec.boundaries, boundaries)
    assert codec.device.type == "cpu"


def test_cache_codec_keeps_keys_and_values_apart() -> None:
    codec = CacheCodec.create(PAGE, seed=5)
    assert codec.value is not None
    assert (codec.key.scale_rule, codec.value.scale_rule) == ("searched", "searched")
    assert not torch.equal(codec.key.signs, codec.value.signs[:64])
    raw = PageLayout(PAGE.key, RawLayout(96), page_size=16, kv_heads=2)
    assert CacheCodec.create(raw).value is None


def test_moving_a_codec() -> None:
    moved = CacheCodec.create(PAGE, center=torch.zeros(2, 64)).to("meta")
    assert moved.key.signs.device.type == moved.key.levels.device.type == "meta"
    assert moved.key.center is not None
    assert moved.key.center.device.type == "meta"
    assert moved.value is not None
    assert moved.value.boundaries.device.type == "meta"


def test_moving_a_codec_with_raw_values() -> None:
    raw = PageLayout(PAGE.key, RawLayout(96), page_size=16, kv_heads=2)
    moved = CacheCodec.create(raw).to("meta")
    assert moved.value is None
    assert moved.key.center is None
    assert moved.key.device.type == "meta"


def test_centre_belongs_to_the_keys_and_is_kept_in_float32() -> None:
    codec = CacheCodec.create(PAGE, center=torch.full((2, 64), 0.5, dtype=torch.bfloat16))
    assert codec.value is not None
    assert codec.value.center is None
    assert codec.key.center is not None
    assert codec.key.center.dtype == torch.float32
    assert torch.equal(codec.key.center, torch.full((2, 64), 0.5))


def test_a_codec_cannot_be_changed_in_place() -> None:
    with pytest.raises(FrozenInstanceError):
        Codec.create(LAYOUT).scale_rule = "norm"  # type: ignore[misc]


def test_centre_is_subtracted_before_and_added_after() -> None:
    generator = torch.Generator().manual_seed(0)
    center = 10 * torch.randn(2, 64, generator=generator)
    x = torch.randn(7, 2, 64, generator=generator)
    plain, centred = Codec.create(LAYOUT), Codec.create(LAYOUT, center=center)
    provider = ReferenceProvider()
    packed = provider.encode(x + center, centred)
    shifted = provider.encode((x + center) - center, plain)
    assert torch.equal(packed.codes, shifted.codes)
    torch.testing.assert_close(provider.decode(packed, centred), provider.decode(shifted, plain) + center)
    near = (provider.decode(packed, centred) - (x + center)).norm()
    far = (provider.decode(provider.encode(x + center, plain), plain) - (x + center)).norm()
    assert near < 0.2 * far


@pytest.mark.parametrize("center", [torch.zeros(64), torch.zeros(2, 32), torch.zeros(2, 64, dtype=torch.int32)])
def test_centre_of_another_shape(center: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="center is"):
        Codec.create(LAYOUT, center=center)


def test_centre_for_other_heads() -> None:
    with pytest.raises(LayoutError, match="kv_heads = 2"):
        CacheCodec.create(PAGE, center=torch.zeros(3, 64))


def test_unknown_scale_rule_and_order() -> None:
    with pytest.raises(ValueError, match="'best'"):
        Codec.create(LAYOUT, scale_rule="best")  # type: ignore[arg-type]
    for options in ({"key_scale": "best"}, {"value_scale": "best"}):
        with pytest.raises(ValueError, match="'best'"):
            CacheCodec.create(PAGE, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="seed is -1"):
        CacheCodec.create(PAGE, seed=-1)
    with pytest.raises(LayoutError, match="184"):
        Codec.create(VectorLayout(184, 4, "int8"))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_centre_that_is_not_finite(bad: float) -> None:
    with pytest.raises(ValueError, match="center holds a NaN"):
        CacheCodec.create(PAGE, center=torch.full((2, 64), bad))


def test_centre_without_dimensions() -> None:
    with pytest.raises(ValueError, match="center is"):
        CacheCodec.create(PAGE, center=torch.zeros(()))
