"""The scale rules against float64, and what is stored."""

from __future__ import annotations

import math

import pytest
import torch

from turboquant_core import Codec, ReferenceProvider, VectorLayout, rotate, unpack_codes
from turboquant_core.layout import BITS
from turboquant_core.scale import SCALE_RULES, ScaleRule, check_scale_rule, to_stored, vector_scale


def expected_scale(z: torch.Tensor, levels: torch.Tensor, rule: str) -> float:
    inner, power, energy = float(z @ levels), float(levels @ levels), float(z @ z)
    return {
        "unbiased": energy / inner,
        "least_squares": inner / power,
        "renorm": math.sqrt(energy / power),
        "norm": math.sqrt(energy / len(z)),
        "searched": energy / inner,
    }[rule]


@pytest.mark.parametrize("rule", SCALE_RULES)
def test_rules(rule: ScaleRule) -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(5, 64, dtype=torch.float64, generator=generator)
    levels = (z * 2).round() / 2 + 0.25 * z.sign()
    got = vector_scale(z, levels, rule)
    assert got.tolist() == pytest.approx([expected_scale(a, b, rule) for a, b in zip(z, levels, strict=True)])


@pytest.mark.parametrize("rule", SCALE_RULES)
def test_zero_vectors_have_scale_zero_and_leave_others_alone(rule: ScaleRule) -> None:
    z = torch.tensor([[0.0, 0.0], [3.0, -4.0]])
    levels = torch.tensor([[-0.5, -0.5], [1.0, -1.0]])
    scale = vector_scale(z, levels, rule)
    assert scale[0] == 0
    assert float(scale[1]) == pytest.approx(expected_scale(z[1], levels[1], rule))


def test_each_rule_has_its_property() -> None:
    z = torch.randn(64, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    levels = z.round() + 0.5
    unbiased, renorm, norm = (vector_scale(z, levels, rule) for rule in ("unbiased", "renorm", "norm"))
    assert float(z @ (unbiased * levels)) == pytest.approx(float(z @ z))
    assert float((renorm * levels).norm()) == pytest.approx(float(z.norm()))
    assert float(norm) == pytest.approx(float(z.norm()) / 8)
    best = vector_scale(z, levels, "least_squares")
    for other in (unbiased, renorm, norm, best * 1.001, best * 0.999):
        assert float((z - best * levels).norm()) < float((z - other * levels).norm())


@pytest.mark.parametrize("bits", BITS)
def test_unbiased_over_rotations(bits: float) -> None:
    x = torch.randn(96, generator=torch.Generator().manual_seed(1))
    query = x + torch.randn(96, generator=torch.Generator().manual_seed(2))
    estimates = []
    for seed in range(400):
        codec = Codec.create(VectorLayout(96, bits, "int8"), seed=seed, scale_rule="unbiased")
        packed = ReferenceProvider().encode(x, codec)
        estimates.append(float(query @ ReferenceProvider().decode(packed, codec)))
    mean, deviation = torch.tensor(estimates).double().mean(), torch.tensor(estimates).double().std()
    assert abs(float(mean) - float(query @ x)) < 4 * float(deviation) / math.sqrt(len(estimates))


@pytest.mark.parametrize("bits", [2.5, 3.5])
@pytest.mark.parametrize("rule", SCALE_RULES)
def test_rules_over_levels_of_two_widths(rule: ScaleRule, bits: float) -> None:
    codec = Codec.create(VectorLayout(96, bits, "cubic"), scale_rule=rule)
    x = torch.randn(7, 96, generator=torch.Generator().manual_seed(5))
    packed = ReferenceProvider().encode(x, codec)
    levels = codec.levels_of(unpack_codes(packed.codes, codec.layout)).double()
    z = rotate(x.double(), codec.signs)
    expected = [expected_scale(a, b, rule) for a, b in zip(z, levels, strict=True)]
    assert packed.scales.tolist() == pytest.approx(expected, rel=1e-3)


def test_stored_scale_saturates_and_keeps_nan() -> None:
    stored = to_stored(torch.tensor([0.0, 1e9, torch.inf, 65504.0, 65503.0, torch.nan]))
    assert stored.dtype == torch.float16
    assert stored[:5].tolist() == [0.0, 65504.0, 65504.0, 65504.0, 65504.0]
    assert stored[5].isnan()


def test_unknown_rule() -> None:
    with pytest.raises(ValueError, match="'median'"):
        check_scale_rule("median")
