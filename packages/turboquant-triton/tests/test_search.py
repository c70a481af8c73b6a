"""The sums of every trial of the search, beside the levels that counting boundaries gives."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from magnitudes import cell_edges, neighbours, positive
from torch import Tensor

from turboquant_core import Codec, VectorLayout
from turboquant_core.scale import MULTIPLIERS
from turboquant_triton.kernels.search import (
    TRIALS,
    add_part,
    best_trial,
    group_count,
    group_start,
    lanes,
    load_groups,
    trial_sums,
)

BITS, FORMS = (2, 3, 4), ("int8", "cubic")
ROWS, COLUMNS = 256, 16


@triton.jit
def sums_kernel(
    x, inner, power, boundaries, levels,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRESENT: tl.constexpr, BITS: tl.constexpr,  # noqa: N803
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)[None, :]
    sums = ()
    for _ in tl.static_range(2 * (TRIALS + group_count(BITS))):
        sums += (tl.zeros((ROWS, lanes(COLUMNS)), tl.float32),)
    groups = load_groups(boundaries, levels, BITS)
    magnitude = tl.load(x + row[:, None] * COLUMNS + column)
    trials = trial_sums(add_part(sums, magnitude, column < PRESENT, groups, PRESENT != COLUMNS, BITS), BITS)
    for trial in tl.static_range(TRIALS):
        tl.store(inner + row * TRIALS + trial, trials[2 * trial])
        tl.store(power + row * TRIALS + trial, trials[2 * trial + 1])


@triton.jit
def best_kernel(inner, power, multiplier, best, ROWS: tl.constexpr):  # noqa: N803
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    sums = ()
    for trial in tl.static_range(TRIALS):
        sums += (tl.load(inner + row * TRIALS + trial), tl.load(power + row * TRIALS + trial))
    chosen, its_inner = best_trial(sums)
    tl.store(multiplier + row, chosen)
    tl.store(best + row, its_inner)


def kernel_sums(tile: Tensor, codec: Codec, present: int = COLUMNS) -> tuple[Tensor, Tensor]:
    """``<u, l>`` and ``|l|^2`` float32 ``[rows, trials]`` of magnitudes ``[rows, COLUMNS]``."""
    rows = tile.shape[0]
    x = torch.nn.functional.pad(tile, (0, 0, 0, -rows % ROWS)).contiguous()
    inner, power = torch.empty((2, x.shape[0], len(MULTIPLIERS)), device=x.device)
    shape = {"ROWS": ROWS, "COLUMNS": COLUMNS, "PRESENT": present, "BITS": int(codec.layout.bits)}
    sums_kernel[(x.shape[0] // ROWS,)](x, inner, power, codec.boundaries, codec.levels, **shape)
    return inner[:rows], power[:rows]


def levels_of(magnitude: Tensor, codec: Codec) -> Tensor:
    """Levels float64 ``[..., trials]`` nearest to multiples of float64 magnitudes."""
    multiples = magnitude.unsqueeze(-1) * torch.tensor(MULTIPLIERS, dtype=torch.float64, device=magnitude.device)
    return positive(codec.levels).double()[(multiples.unsqueeze(-1) > positive(codec.boundaries)).sum(-1)]


def assert_levels(magnitudes: Tensor, codec: Codec) -> None:
    """One magnitude a row, so that its sums show its level; the zeros beside it have the least level."""
    tile = torch.nn.functional.pad(magnitudes[:, None], (0, COLUMNS - 1))
    inner, power = (sums.double() for sums in kernel_sums(tile, codec))
    u, zeros = magnitudes.double(), (COLUMNS - 1) * float(positive(codec.levels)[0]) ** 2
    matches = torch.zeros_like(inner, dtype=torch.bool)
    # An exact product, or one rounded to float32.
    for rounding in (-(2.0**-24), 0.0, 2.0**-24):
        level = levels_of(u * (1 + rounding), codec)
        close = torch.isclose(inner, u[:, None] * level, rtol=2e-6, atol=0)
        matches |= close & torch.isclose(power, level.square() + zeros, rtol=2e-6, atol=0)
    assert matches.all(), magnitudes[~matches.all(-1)]


def codec_of(bits: float, form: Any, device: torch.device) -> Codec:
    return Codec.create(VectorLayout(64, bits, form), device=device, scale_rule="searched")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bits", BITS)
def test_every_trial_beside_every_boundary_and_edge_of_a_cell(bits: int, form: Any, device: torch.device) -> None:
    codec = codec_of(bits, form, device)
    crossings = torch.cat([positive(codec.boundaries) / multiplier for multiplier in MULTIPLIERS])
    for values in (neighbours(crossings, 12), neighbours(torch.cat([positive(codec.levels), cell_edges(device)]), 2)):
        assert_levels(values, codec)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), bits=st.sampled_from(BITS), form=st.sampled_from(FORMS))
def test_every_trial_of_any_magnitude(seed: int, bits: int, form: Any, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(seed)
    small = torch.randint(0x00800000, 0x41800000, (64,), generator=generator, dtype=torch.int32).view(torch.float32)
    ordinary = torch.rand(192, generator=generator) * 4
    assert_levels(torch.cat([small, ordinary]).to(device), codec_of(bits, form, device))


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**31 - 1),
    bits=st.sampled_from(BITS),
    form=st.sampled_from(FORMS),
    present=st.integers(1, COLUMNS),
)
def test_sums_of_rows(seed: int, bits: int, form: Any, present: int, device: torch.device) -> None:
    codec = codec_of(bits, form, device)
    tile = torch.randn((40, COLUMNS), generator=torch.Generator().manual_seed(seed)).abs().to(device)
    tile[:, present:] = 0
    inner, power = kernel_sums(tile, codec, present)
    levels = levels_of(tile.double(), codec)[:, :present]
    expected = (tile.double()[:, :present, None] * levels).sum(1)
    torch.testing.assert_close(inner.double(), expected, rtol=2e-6, atol=0)
    torch.testing.assert_close(power.double(), levels.square().sum(1), rtol=2e-6, atol=0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bits", BITS)
def test_a_group_crosses_one_boundary(bits: int, form: Any) -> None:
    boundaries = positive(codec_of(bits, form, torch.device("cpu")).boundaries).double()
    starts = [int(group_start(group, bits)) for group in range(int(group_count(bits)) + 1)]
    assert starts[-1] == len(MULTIPLIERS)
    for first, end in pairwise(starts):
        assert (boundaries[1:] / boundaries[:-1] > MULTIPLIERS[end - 1] / MULTIPLIERS[first]).all()


def test_the_first_of_the_largest_cosines_is_kept(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(3)
    inner = torch.randint(1, 5, (ROWS, len(MULTIPLIERS)), generator=generator).float().to(device)
    power = torch.randint(1, 3, inner.shape, generator=generator).float().to(device)
    inner[0] = 0
    multiplier, best = torch.empty((2, inner.shape[0]), device=device)
    best_kernel[(inner.shape[0] // ROWS,)](inner, power, multiplier, best, ROWS=ROWS)
    # Exact in float64: small integers.
    cosine = inner.double().square() / power
    first = (cosine == cosine.amax(1, keepdim=True)).int().argmax(1)
    assert torch.equal(multiplier, torch.tensor(MULTIPLIERS, device=device)[first])
    assert torch.equal(best, inner.gather(1, first[:, None])[:, 0])
