"""Shaped codes: a smaller weighted error in the same bytes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from turboquant_core import Codec, ReferenceProvider, VectorLayout, rotate
from turboquant_core.shaping import ShapedCodec, output_moment, query_moment, shaped

HEADS, HEAD_DIM = 2, 64
REFERENCE = ReferenceProvider()


def weight_of(rank: int, seed: int = 0, head_dim: int = HEAD_DIM) -> Tensor:
    """Second moment ``[heads, d, d]`` of ``rank`` random directions with energies that fall off."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(HEADS, rank, head_dim, generator=generator) * torch.linspace(4, 0.1, rank).unsqueeze(-1)
    return rows.mT @ rows / rank


def vectors(n: int, seed: int = 1, head_dim: int = HEAD_DIM) -> Tensor:
    return torch.randn(n, HEADS, head_dim, generator=torch.Generator().manual_seed(seed))


def plain_codec(bits: float, form: str = "int8", head_dim: int = HEAD_DIM) -> Codec:
    return Codec.create(VectorLayout(head_dim, bits, form), scale_rule="unbiased")


def weighted_error(x: Tensor, codec: Codec, weight: Tensor) -> float:
    """Mean of ``e^T W e`` over vectors, float64, from the packed bytes."""
    error = (x - REFERENCE.decode(REFERENCE.encode(x, codec), codec)).double()
    return float(torch.einsum("nhd,hde,nhe->n", error, weight.double(), error).mean())


@pytest.mark.parametrize("form", ["int8", "cubic"])
@pytest.mark.parametrize("bits", [2, 2.5, 3, 3.5, 4])
def test_the_weighted_error_shrinks_in_the_same_bytes(bits: float, form: str) -> None:
    codec, weight, x = plain_codec(bits, form), weight_of(HEAD_DIM // 2), vectors(200)
    better = shaped(codec, weight)
    assert weighted_error(x, better, weight) < 0.6 * weighted_error(x, codec, weight)
    packed = REFERENCE.encode(x, better)
    assert packed.codes.shape == REFERENCE.encode(x, codec).codes.shape
    # The plain codec reads what the shaped one wrote.
    assert torch.equal(REFERENCE.decode(packed, codec), REFERENCE.decode(packed, better))


def test_inner_products_with_the_vector_itself_stay_unbiased() -> None:
    codec, x = shaped(plain_codec(2), weight_of(HEAD_DIM)), vectors(200)
    decoded = REFERENCE.decode(REFERENCE.encode(x, codec), codec)
    assert torch.allclose((x * decoded).sum(-1), x.square().sum(-1), rtol=2e-3)


def test_no_move_of_one_coordinate_improves_a_settled_vector() -> None:
    weight, x = weight_of(HEAD_DIM), vectors(3)
    codec = shaped(plain_codec(2), weight, sweeps=50)
    unit = codec_unit(x, codec)
    codes, best = codec.codes_of(unit), float("inf")
    settled = error_of(unit, codec, codes)
    for i in range(HEAD_DIM):
        for step in (-1, 1):
            moved = codes.clone()
            moved[..., i] = (codes[..., i].int() + step).clamp(0, 3)
            best = min(best, float((error_of(unit, codec, moved) - settled).min()))
    assert best > -1e-4


def codec_unit(x: Tensor, codec: Codec) -> Tensor:
    """Rotated vectors whose coordinates have mean square 1."""
    z = rotate(x, codec.signs)
    return z / z.square().mean(-1, keepdim=True).sqrt()


def error_of(unit: Tensor, codec: ShapedCodec, codes: Tensor) -> Tensor:
    """Weighted error ``[n, heads]`` of codes under their unbiased scale, float64."""
    levels, u = codec.levels_of(codes).double(), unit.double()
    error = u - levels * (u.square().sum(-1) / (u * levels).sum(-1)).unsqueeze(-1)
    return torch.einsum("nhd,hde,nhe->nh", error, codec.weight.double(), error)


@settings(max_examples=15, deadline=None)
@given(st.sampled_from([8, 40, 80]), st.sampled_from([2, 3, 4]), st.integers(0, 5), st.integers(0, 99))
def test_any_shape_encodes_alike_alone_and_in_a_batch(head_dim: int, bits: int, n: int, seed: int) -> None:
    codec = shaped(plain_codec(bits, head_dim=head_dim), weight_of(head_dim, seed, head_dim))
    x = vectors(n, seed, head_dim)
    packed = REFERENCE.encode(x, codec)
    decoded = REFERENCE.decode(packed, codec)
    assert decoded.shape == x.shape
    for i in range(n):
        assert torch.allclose(REFERENCE.decode(REFERENCE.encode(x[i], codec), codec), decoded[i], atol=0.5), i


def test_zero_and_infinite_vectors_affect_no_other() -> None:
    codec, x = shaped(plain_codec(3), weight_of(HEAD_DIM)), vectors(4)
    clean = REFERENCE.decode(REFERENCE.encode(x, codec), codec)
    x[1], x[2, 0, 0] = 0, torch.inf
    spoilt = REFERENCE.decode(REFERENCE.encode(x, codec), codec)
    assert not spoilt[1].any()
    assert spoilt[2, 0].isnan().all()
    assert torch.equal(spoilt[[0, 3]], clean[[0, 3]])


def test_the_same_weight_on_another_device_is_the_same_codec() -> None:
    codec = shaped(plain_codec(3), weight_of(HEAD_DIM))
    x = vectors(5)
    moved = codec.to("cpu")
    assert torch.equal(REFERENCE.encode(x, moved).codes, REFERENCE.encode(x, codec).codes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(HEAD_DIM, HEAD_DIM)}, r"must be float \[kv_heads, 64, 64\]"),
        ({"weight": torch.full((HEADS, HEAD_DIM, HEAD_DIM), torch.nan)}, "NaN"),
        ({"weight": torch.randn(HEADS, HEAD_DIM, HEAD_DIM)}, "not symmetric"),
        ({"weight": -weight_of(HEAD_DIM)}, "positive semi-definite"),
        ({"damping": 0.0}, "damping is 0.0"),
        ({"sweeps": -1}, "sweeps -1"),
    ],
)
def test_bad_arguments(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shaped(plain_codec(3), **{"weight": weight_of(HEAD_DIM), **change})


def test_other_scale_rules_are_refused() -> None:
    codec = Codec.create(VectorLayout(HEAD_DIM, 3, "cubic"), scale_rule="least_squares")
    with pytest.raises(ValueError, match="need 'searched' or 'unbiased'"):
        shaped(codec, weight_of(HEAD_DIM))


def test_another_number_of_heads_is_refused() -> None:
    with pytest.raises(ValueError, match="kv_heads = 2"):
        REFERENCE.encode(torch.randn(4, 3, HEAD_DIM), shaped(plain_codec(3), weight_of(HEAD_DIM)))


def test_moments_are_sums_over_the_query_heads_of_a_kv_head() -> None:
    generator = torch.Generator().manual_seed(8)
    query = torch.randn(2, 6, 5, 4, generator=generator)
    per_head = torch.einsum("bhtd,bhte->hde", query.double(), query.double()) / 10
    expected = per_head.view(2, 3, 4, 4).mean(1)
    torch.testing.assert_close(query_moment(query, 2).double(), expected, rtol=1e-5, atol=1e-5)
    weight = torch.randn(7, 6 * 4, generator=generator)
    columns = weight.double().view(7, 6, 4)
    expected = torch.stack([sum(columns[:, h].T @ columns[:, h] for h in group) for group in ((0, 1, 2), (3, 4, 5))])
    torch.testing.assert_close(output_moment(weight, 2, 4).double(), expected, rtol=1e-5, atol=1e-5)
