"""Codebooks against published errors, an independent quadrature, and a second solution of the shipped numbers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from importlib.resources import files
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from turboquant_core import Codebook, format_codebook, lloyd_max
from turboquant_core.codebook import CubicLevels, Int8Levels, format_constants
from turboquant_core.codebook.density import Float64, Gaussian, coordinate_density, mean_squared_error
from turboquant_core.codebook.generate import HEAD_DIMS, dump, solve_all
from turboquant_core.codebook.lloyd import centroid_residual, solve
from turboquant_core.codebook.optimise import CUBIC_C, best_step, optimise, optimise_cubic
from turboquant_core.layout import FORMS, WIDTHS, Form

# From the centroid condition solved in 40-digit arithmetic with the complementary error function.
GAUSSIAN_MSE = {
    1: 0.3633802276324187,
    2: 0.1174818478293293,
    3: 0.03454776078850373,
    4: 0.009501008008191886,
    5: 0.002504668355674799,
    6: 0.0006442396653172623,
    7: 0.0001634782299802368,
    8: 4.118508286711749e-5,
}


def upper_half(codebook: Codebook) -> Float64:
    return np.asarray(codebook.levels[len(codebook.levels) // 2 :])


def normal_pdf(t: float) -> float:
    return float(stats.norm.pdf(t))


def sphere_pdf(head_dim: int) -> Callable[[float], float]:
    """Density of ``t = sqrt(d) y`` where ``(y + 1) / 2`` is Beta((d - 1) / 2, (d - 1) / 2)."""
    shape, radius = (head_dim - 1) / 2, head_dim**0.5
    return lambda t: float(stats.beta.pdf((t / radius + 1) / 2, shape, shape)) / (2 * radius)


def quantization_error(codebook: Codebook, pdf: Callable[[float], float], end: float) -> float:
    edges = [-end, *codebook.boundaries, end]
    cells = zip(codebook.levels, edges[:-1], edges[1:], strict=True)
    return sum(float(integrate.quad(lambda t, c=c: (t - c) ** 2 * pdf(t), a, b, epsabs=1e-14)[0]) for c, a, b in cells)


@pytest.mark.parametrize(("bits", "expected"), GAUSSIAN_MSE.items())
def test_gaussian_error_is_the_known_one(bits: int, expected: float) -> None:
    assert lloyd_max(bits).mse == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("bits", "published"), [(2, 0.117482), (3, 0.034548), (4, 0.009501)])
def test_gaussian_error_is_the_published_one(bits: int, published: float) -> None:
    assert lloyd_max(bits).mse == pytest.approx(published, abs=1e-6)


def test_one_bit_is_known_in_closed_form() -> None:
    assert lloyd_max(1).levels == pytest.approx([-np.sqrt(2 / np.pi), np.sqrt(2 / np.pi)], rel=1e-13)
    assert lloyd_max(1).mse == pytest.approx(1 - 2 / np.pi, rel=1e-13)


@pytest.mark.parametrize("bits", range(1, 9))
def test_three_dimensions_have_uniform_levels(bits: int) -> None:
    """A coordinate of a point on the sphere is uniform (Archimedes)."""
    codebook, width = lloyd_max(bits, 3), 2 * 3**0.5 / 2**bits
    expected = [(code + 0.5) * width - 3**0.5 for code in range(2**bits)]
    assert codebook.levels == pytest.approx(expected, abs=1e-12)
    assert codebook.mse == pytest.approx(width**2 / 12, rel=1e-10)


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("head_dim", [None, 4, 24, 128])
def test_error_agrees_with_adaptive_quadrature(bits: int, head_dim: int | None) -> None:
    pdf, end = (normal_pdf, 12.0) if head_dim is None else (sphere_pdf(head_dim), head_dim**0.5)
    codebook = lloyd_max(bits, head_dim)
    assert codebook.mse == pytest.approx(quantization_error(codebook, pdf, end), rel=1e-9)


@pytest.mark.parametrize("head_dim", [None, 3, 4, 5, 8, 128, 1024])
def test_densities_have_mass_and_variance_one(head_dim: int | None) -> None:
    t, weights = coordinate_density(head_dim).quadrature(np.array([0.0, 0.5, 1.5, 3.0, np.inf]))
    assert 2 * weights.sum() == pytest.approx(1, rel=1e-12)
    assert 2 * (weights * t**2).sum() == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("head_dim", [None, *HEAD_DIMS, 8, 72, 1024])
def test_centroid_condition_holds_at_every_bit_width(head_dim: int | None) -> None:
    density = coordinate_density(head_dim)
    for bits in range(1, 9):
        assert centroid_residual(upper_half(lloyd_max(bits, head_dim)), density) < 1e-12


@settings(max_examples=40, deadline=None, derandomize=True)
@given(head_dim=st.integers(3, 2048), bits=st.integers(1, 8))
def test_any_head_dim_is_solved(head_dim: int, bits: int) -> None:
    density = coordinate_density(head_dim)
    upper = solve(bits, density)
    assert upper.shape == (2 ** (bits - 1),)
    assert (np.diff(upper, prepend=0.0) > 0).all()
    assert upper[-1] < head_dim**0.5
    assert centroid_residual(upper, density) < 1e-12


def test_shipped_levels_are_the_recomputed_ones() -> None:
    shipped = json.loads(files("turboquant_core.codebook").joinpath("data/lloyd_max.json").read_text("utf-8"))
    recomputed = solve_all()
    assert shipped.keys() == recomputed.keys() == {"gaussian", *map(str, HEAD_DIMS)}
    for name, codebooks in recomputed.items():
        assert list(shipped[name]) == [str(bits) for bits in range(1, 9)]
        for bits, levels in codebooks.items():
            assert shipped[name][bits] == pytest.approx(levels, rel=0, abs=1e-11)
    assert json.loads(dump(shipped)) == shipped


def test_spherical_codebooks_approach_the_gaussian_one() -> None:
    gaps = [abs(lloyd_max(4, head_dim).mse - lloyd_max(4).mse) for head_dim in (64, 128, 256, 512, 2048)]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < 2e-3 * lloyd_max(4).mse


@pytest.mark.parametrize(
    "codebook", [lloyd_max(3), lloyd_max(8, 64), format_codebook("int8", 4), format_codebook("cubic", 3)]
)
def test_codebooks_are_ascending_and_symmetric(codebook: Codebook) -> None:
    assert list(codebook.levels) == sorted(set(codebook.levels))
    assert [-level for level in reversed(codebook.levels)] == list(codebook.levels)
    assert len(codebook.boundaries) == len(codebook.levels) - 1
    assert codebook.boundaries[len(codebook.levels) // 2 - 1] == 0
    assert list(codebook.boundaries) == [
        (a + b) / 2 for a, b in zip(codebook.levels[:-1], codebook.levels[1:], strict=True)
    ]


def test_tensors_are_float32() -> None:
    codebook = lloyd_max(4)
    levels, boundaries = codebook.tensors("cpu")
    assert levels.dtype == boundaries.dtype == torch.float32
    assert torch.equal(levels, torch.tensor(codebook.levels))
    assert torch.equal(boundaries, torch.tensor(codebook.boundaries))


@pytest.mark.parametrize("bits", [-1, 0, 9, 2.0, 2.5, True, "2", None])
def test_other_bits_are_refused(bits: Any) -> None:
    lloyd_max(1), lloyd_max(2)  # a cache takes True for 1 and 2.0 for 2
    message = f"bits is {bits!r}; the textbook's codebooks have (1, 2, 3, 4, 5, 6, 7, 8): choose one of them"
    with pytest.raises(ValueError, match=re.escape(message)):
        lloyd_max(bits)


@pytest.mark.parametrize("head_dim", [-1, 0, 2, 128.0, True, "128"])
def test_head_dim_without_a_density(head_dim: Any) -> None:
    lloyd_max(4, 128)
    with pytest.raises(ValueError, match=re.escape(f"head_dim is {head_dim!r}; it must be an integer of at least 3")):
        lloyd_max(4, head_dim)


class _NoStart(Gaussian):
    """A density whose search starts nowhere."""

    def spread(self, probability: Float64) -> Float64:
        return np.full_like(probability, np.nan)


def test_a_search_that_fails_says_so() -> None:
    with pytest.raises(ArithmeticError, match=r"Lloyd-Max with 4 bits .* has not converged"):
        solve(4, _NoStart())


@pytest.mark.parametrize(
    ("form", "bits", "percent"),
    [
        ("int8", 2, 0.00004),
        ("int8", 3, 0.0013),
        ("int8", 4, 0.0448),
        ("cubic", 2, 0.0000004),
        ("cubic", 3, 0.2191),
        ("cubic", 4, 1.9702),
    ],
)
def test_format_costs_little_over_lloyd_max(form: Form, bits: int, percent: float) -> None:
    excess = 100 * (format_codebook(form, bits).mse / lloyd_max(bits).mse - 1)
    assert 0 < excess == pytest.approx(percent, rel=0.1 if percent < 0.01 else 1e-3)


def test_format_constants_are_the_reoptimised_ones() -> None:
    recomputed = optimise()
    for form in FORMS:
        for bits in WIDTHS:
            shipped, found = format_constants(form, bits), recomputed[form][str(bits)]
            if isinstance(shipped, Int8Levels):
                assert list(shipped.q) == found["q"]
            else:
                assert shipped.c == found["c"]
            assert shipped.step == pytest.approx(found["step"], rel=1e-7)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("form", FORMS)
def test_no_other_step_is_better(form: Form, bits: int) -> None:
    constants = format_constants(form, bits)
    levels = np.asarray(constants.levels())
    best = mean_squared_error(levels.tolist(), Gaussian())
    for factor in (1 - 1e-4, 1 + 1e-4):
        assert mean_squared_error((levels * factor).tolist(), Gaussian()) > best
    assert best_step((levels / constants.step).tolist(), constants.step) == pytest.approx(constants.step, rel=1e-7)


@pytest.mark.parametrize("bits", WIDTHS)
def test_no_other_c_saves_more_than_a_twenty_thousandth(bits: int) -> None:
    errors = [
        mean_squared_error(optimise_cubic(bits, CUBIC_C[bits] + k / 4).levels(), Gaussian()) for k in range(-16, 17)
    ]
    assert errors[16] <= min(errors) * 1.00005


@pytest.mark.parametrize("c", CUBIC_C.values())
def test_cubic_c_is_exact_in_half_precision(c: float) -> None:
    assert float(np.float16(c)) == c


def test_int8_levels_are_bytes() -> None:
    for bits in WIDTHS:
        constants = format_constants("int8", bits)
        assert isinstance(constants, Int8Levels)
        assert list(constants.q) == sorted(set(constants.q))
        assert constants.q[0] >= 0
        assert constants.q[-1] <= 127


def test_cubic_levels_follow_the_polynomial() -> None:
    constants = CubicLevels(bits=2, c=10.0, step=0.5)
    assert constants.levels() == pytest.approx([-9.1875, -2.5625, 2.5625, 9.1875], rel=1e-15)


@pytest.mark.parametrize("bits", [5, 1, 2.5, 4.0, True, "4"])
@pytest.mark.parametrize("form", FORMS)
def test_bits_that_the_format_has_not(form: Form, bits: Any) -> None:
    format_codebook(form, 4)
    message = f"bits is {bits!r}; codes of the format have (2, 3, 4): choose one of them"
    with pytest.raises(ValueError, match=re.escape(message)):
        format_codebook(form, bits)


def test_unknown_form() -> None:
    with pytest.raises(ValueError, match=r"form is 'uniform'; the format has \('int8', 'cubic'\): choose one of them"):
        format_codebook("uniform", 4)  # type: ignore[arg-type]
