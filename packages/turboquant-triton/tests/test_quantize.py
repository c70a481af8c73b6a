"""The nearest level of a magnitude, beside the levels that counting boundaries gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from turboquant_core import Codec, VectorLayout
from turboquant_triton.kernels.quantize import (
    BEYOND,
    CELL,
    CELLS,
    level_index,
    load_bounds,
    load_levels,
    nearest,
)

BITS, FORMS = (2, 3, 4), ("int8", "cubic")
ROW = 32


@triton.jit
def nearest_kernel(x, out, index, boundaries, levels, COLUMNS: tl.constexpr, BITS: tl.constexpr):  # noqa: N803
    at = tl.program_id(0) * 2 * COLUMNS + tl.arange(0, 2)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    bounds = load_bounds(boundaries, BITS)
    level = nearest(tl.load(x + at), bounds, load_levels(levels, boundaries, BITS), BITS)
    tl.store(out + at, level)
    tl.store(index + at, level_index(level))


def kernel_nearest(magnitudes: Tensor, codec: Codec) -> tuple[Tensor, Tensor]:
    """Levels and indices of float32 ``[count]``."""
    count = magnitudes.numel()
    x = torch.nn.functional.pad(magnitudes, (0, -count % (2 * ROW)))
    out, index = torch.empty_like(x), torch.empty_like(x, dtype=torch.int32)
    bits = int(codec.layout.bits)
    nearest_kernel[(x.numel() // (2 * ROW),)](x, out, index, codec.boundaries, codec.levels, COLUMNS=ROW, BITS=bits)
    return out[:count], index[:count]


def positive(values: Tensor) -> Tensor:
    """The half above zero of boundaries (without zero itself) or of levels."""
    return values[(values.numel() + 1) // 2 :]


def neighbours(values: Tensor, steps: int) -> Tensor:
    """Positive float32 numbers up to ``steps`` representable ones away from each of ``values``."""
    around = torch.arange(-steps, steps + 1, dtype=torch.int32, device=values.device)
    return (values.view(torch.int32)[:, None] + around).flatten().view(torch.float32)


def assert_nearest(magnitudes: Tensor, codec: Codec) -> None:
    level, index = kernel_nearest(magnitudes, codec)
    expected = (magnitudes[:, None] > positive(codec.boundaries)).sum(1)
    assert torch.equal(index.long(), expected)
    # The last three bits of a level hold its index.
    assert ((level.view(torch.int32) ^ positive(codec.levels)[expected].view(torch.int32)) < 8).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bits", BITS)
def test_exact_beside_boundaries_and_edges_of_cells(bits: int, form: Any, device: torch.device) -> None:
    codec = Codec.create(VectorLayout(64, bits, form), device=device)
    cells = torch.arange(1, 4 * CELLS.value + 8, device=device)
    edges = (cells.float() - 0.5) * (CELL.value / 4)
    for values in (positive(codec.boundaries), positive(codec.levels), edges, edges.new_tensor([BEYOND.value])):
        assert_nearest(neighbours(values, 40), codec)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bits", BITS)
def test_extreme_magnitudes(bits: int, form: Any, device: torch.device) -> None:
    codec = Codec.create(VectorLayout(64, bits, form), device=device)
    info = torch.finfo(torch.float32)
    extreme = [0.0, info.smallest_normal * info.eps, info.smallest_normal, 2.0**19, 2.0**24, info.max, torch.inf]
    assert_nearest(torch.tensor(extreme, device=device), codec)
    # A vector with a NaN gets other codes afterwards; only the table must not be left.
    _, index = kernel_nearest(torch.tensor([torch.nan], device=device), codec)
    assert 0 <= int(index) < 1 << (bits - 1)


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
    cells = torch.floor((boundaries / CELL.value * 4).round() / 4)
    assert cells.unique().numel() == boundaries.numel()
    assert cells.max() < min(CELLS.value, BEYOND.value / CELL.value)
