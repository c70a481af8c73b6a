"""The nearest level of a magnitude, beside the levels that counting boundaries gives."""

from __future__ import annotations

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
from turboquant_triton.kernels.cells import BEYOND, CELLS, CELLS_PER_UNIT
from turboquant_triton.kernels.quantize import (
    level_index,
    load_bounds,
    load_indices,
    load_levels,
    nearest,
    nearest_index,
)

BITS, FORMS = (2, 3, 4), ("int8", "cubic")
ROW = 32


@triton.jit
def nearest_kernel(x, out, index, only, boundaries, levels, COLUMNS: tl.constexpr, BITS: tl.constexpr):  # noqa: N803
    at = tl.program_id(0) * 2 * COLUMNS + tl.arange(0, 2)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    bounds = load_bounds(boundaries, BITS)
    level = nearest(tl.load(x + at), bounds, load_levels(levels, boundaries, BITS), BITS)
    tl.store(out + at, level)
    tl.store(index + at, level_index(level))
    tl.store(only + at, nearest_index(tl.load(x + at), load_indices(boundaries, BITS), BITS))


def kernel_nearest(magnitudes: Tensor, codec: Codec) -> tuple[Tensor, Tensor, Tensor]:
    """Levels of float32 ``[count]``, their indices, and the indices that are looked up without the levels."""
    count = magnitudes.numel()
    x = torch.nn.functional.pad(magnitudes, (0, -count % (2 * ROW)))
    out, index, only = torch.empty_like(x), *torch.empty((2, x.numel()), dtype=torch.int32, device=x.device)
    bits = int(codec.layout.bits)
    grid = (x.numel() // (2 * ROW),)
    nearest_kernel[grid](x, out, index, only, codec.boundaries, codec.levels, COLUMNS=ROW, BITS=bits)
    return out[:count], index[:count], only[:count]


def assert_nearest(magnitudes: Tensor, codec: Codec) -> None:
    level, index, only = kernel_nearest(magnitudes, codec)
    expected = (magnitudes[:, None] > positive(codec.boundaries)).sum(1)
    assert torch.equal(index.long(), expected)
    assert torch.equal(only.long(), expected)
    # The last three bits of a level hold its index.
    assert ((level.view(torch.int32) ^ positive(codec.levels)[expected].view(torch.int32)) < 8).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bits", BITS)
def test_exact_beside_boundaries_and_edges_of_cells(bits: int, form: Any, device: torch.device) -> None:
    codec = Codec.create(VectorLayout(64, bits, form), device=device)
    assert_nearest(neighbours(torch.cat([positive(codec.boundaries), positive(codec.levels)]), 40), codec)
    assert_nearest(neighbours(cell_edges(device), 4), codec)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bits", BITS)
def test_extreme_magnitudes(bits: int, form: Any, device: torch.device) -> None:
    codec = Codec.create(VectorLayout(64, bits, form), device=device)
    info = torch.finfo(torch.float32)
    extreme = [0.0, info.smallest_normal * info.eps, info.smallest_normal, 2.0**19, 2.0**24, info.max, torch.inf]
    assert_nearest(torch.tensor(extreme, device=device), codec)
    # A vector with a NaN gets other codes afterwards; only the table must not be left.
    _, *indices = kernel_nearest(torch.tensor([torch.nan], device=device), codec)
    assert all(0 <= int(index) < 1 << (bits - 1) for index in indices)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), bits=st.sampled_from(BITS), form=st.sampled_from(FORMS))
def test_exact_for_any_float(seed: int, bits: int, form: Any, device: torch.device) -> None:
    codec = Codec.create(VectorLayout(64, bits, form), device=device)
    generator = torch.Generator().manual_seed(seed)
    any_bits = torch.randint(0, 0x7F800000, (64,), generator=generator, dtype=torch.int32).view(torch.float32)
    ordinary = torch.rand(192, generator=generator) * 4
    assert_nearest(torch.cat([any_bits, ordinary]).to(device), codec)


@pytest.mark.parametrize("form", FORMS)
def test_no_cell_holds_two_boundaries(form: Any) -> None:
    """For every float at once: rounding to cells keeps order, so one comparison in a cell of one boundary is exact."""
    boundaries = positive(Codec.create(VectorLayout(64, 4, form)).boundaries)
    for fractions in (4, 8):
        cells = torch.floor((boundaries * CELLS_PER_UNIT.value * fractions).round() / fractions)
        assert cells.unique().numel() == boundaries.numel()
        assert cells.max() < CELLS.value
    assert BEYOND.value * CELLS_PER_UNIT.value < CELLS.value
