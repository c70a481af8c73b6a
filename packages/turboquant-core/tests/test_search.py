"""The rule `searched`: of the codes of a few multiples of a vector, those nearest in direction."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from turboquant_core import CacheCodec, Codec, PageLayout, ReferenceProvider, VectorLayout
from turboquant_core.layout import BITS
from turboquant_core.packing import unpack_codes
from turboquant_core.scale import MULTIPLIERS

REFERENCE = ReferenceProvider()


def codec_of(bits: float, form: Any = "int8", head_dim: int = 64, rule: Any = "searched") -> Codec:
    return Codec.create(VectorLayout(head_dim, bits, form), scale_rule=rule)


def cosine(unit: Tensor, codes: Tensor, codec: Codec) -> Tensor:
    return torch.cosine_similarity(unit.double(), codec.levels_of(codes).double(), -1)


def test_multipliers_are_evenly_spaced_around_one() -> None:
    steps = {b - a for a, b in pairwise(MULTIPLIERS)}
    assert len(steps) == 1
    assert MULTIPLIERS[len(MULTIPLIERS) // 2] == 1.0
    assert all(float(torch.tensor(m, dtype=torch.float16)) == m for m in MULTIPLIERS)


@settings(deadline=None, max_examples=60)
@given(
    bits=st.sampled_from(BITS),
    form=st.sampled_from(["int8", "cubic"]),
    head_dim=st.sampled_from([32, 64, 96, 128]),
    seed=st.integers(0, 2**31),
    power=st.floats(0.3, 3),
)
def test_no_multiple_has_codes_of_a_larger_cosine(
    bits: float, form: Any, head_dim: int, seed: int, power: float
) -> None:
    codec = codec_of(bits, form, head_dim)
    unit = torch.randn(9, head_dim, generator=torch.Generator().manual_seed(seed))
    unit = unit.sign() * unit.abs() ** power
    unit = unit / unit.square().mean(-1, keepdim=True).sqrt()
    tried = torch.stack([cosine(unit, codec.nearest_codes(unit * m), codec) for m in MULTIPLIERS])
    torch.testing.assert_close(cosine(unit, codec.codes_of(unit), codec), tried.amax(0), rtol=0, atol=1e-6)


def test_bytes_are_those_of_the_codes_with_an_unbiased_scale() -> None:
    codec, x = codec_of(3), torch.randn(20, 64, generator=torch.Generator().manual_seed(4))
    packed = REFERENCE.encode(x, codec)
    estimate = REFERENCE.decode(packed, codec)
    # <x, estimate> = |x|^2, but for the scale's rounding to fp16.
    torch.testing.assert_close((estimate * x).sum(-1), x.square().sum(-1), rtol=1e-3, atol=0)
    plain = codec_of(3, rule="unbiased")
    torch.testing.assert_close(REFERENCE.decode(packed, plain), estimate, rtol=0, atol=0)
    assert not torch.equal(
        unpack_codes(packed.codes, codec.layout), unpack_codes(REFERENCE.encode(x, plain).codes, plain.layout)
    )


@pytest.mark.parametrize(
    ("bits", "head_dim", "least"), [(4, 64, 0.14), (4, 128, 0.10), (3, 64, 0.07), (3, 128, 0.04), (2, 128, 0.005)]
)
def test_error_falls(bits: int, head_dim: int, least: float) -> None:
    x = torch.randn(4000, head_dim, generator=torch.Generator().manual_seed(0))

    def error(rule: Any) -> float:
        codec = codec_of(bits, head_dim=head_dim, rule=rule)
        return float((REFERENCE.decode(REFERENCE.encode(x, codec), codec) - x).square().sum())

    assert error("searched") < (1 - least) * error("unbiased")


def test_zero_and_bad_vectors_harm_no_other() -> None:
    codec, x = codec_of(4), torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    clean = REFERENCE.encode(x, codec)
    x[1], x[2, 3] = 0, torch.nan
    packed = REFERENCE.encode(x, codec)
    assert packed.scales[1] == 0
    assert packed.scales[2].isnan()
    assert not unpack_codes(packed.codes[2], codec.layout).any()
    assert torch.equal(packed.codes[1], REFERENCE.encode(torch.zeros(64), codec_of(4, rule="unbiased")).codes)
    for untouched in (0, 3, 4):
        assert torch.equal(packed.codes[untouched], clean.codes[untouched])


def test_pages_hold_searched_codes() -> None:
    layout = PageLayout(VectorLayout(64, 4, "int8"), VectorLayout(64, 3, "cubic"), page_size=16, kv_heads=1)
    codec = CacheCodec.create(layout)
    assert codec.value is not None
    x, pages = torch.randn(2, 1, 64), torch.zeros(layout.pages_shape(1), dtype=torch.uint8)
    REFERENCE.store(x, x, pages, torch.arange(2), codec)
    table = torch.zeros(1, 1, dtype=torch.int32)
    keys, values = REFERENCE.gather(pages, table, codec, start=0, stop=2, dtype=torch.float32)
    for got, own in ((keys, codec.key), (values, codec.value)):
        assert torch.equal(got[0, 0], REFERENCE.decode(REFERENCE.encode(x, own), own)[:, 0])
