"""Launch parameters and the constants of a layout."""

from __future__ import annotations

import pytest
import torch
from gpu_memory import SHARED_MEMORY

from turboquant_core import RawLayout, VectorLayout
from turboquant_core.testing.cases import page_layout
from turboquant_triton.device import hadamard_fp16, hadamard_int8
from turboquant_triton.launch import (
    LARGE,
    SMALL,
    coordinates,
    fitted,
    launch_parameters,
    make_constants,
    rotation_operand,
)


def test_no_call_makes_constants_after_the_request(device: torch.device) -> None:
    """Those of attention too: a matrix made while a CUDA graph is captured would lie in the graph's memory."""
    for cache in (rotation_operand, hadamard_fp16, hadamard_int8):
        cache.cache_clear()
    make_constants(page_layout(4, 3, 64, value_head_dim=80), device)
    made = [cache.cache_info().misses for cache in (rotation_operand, hadamard_fp16)]
    rotation_operand(64, 4, device)
    rotation_operand(80, 3, device)
    hadamard_fp16(64, device, False)
    hadamard_fp16(80, device, True)
    assert [cache.cache_info().misses for cache in (rotation_operand, hadamard_fp16)] == made


def test_every_coordinate_has_one_position() -> None:
    for bits in (2, 3, 4):
        for head_dim in (16, 64, 80, 112, 128, 256):
            placed = [index for index in coordinates(head_dim, bits) if index >= 0]
            assert sorted(placed) == list(range(head_dim))
    for bits in (2.5, 3.5):
        for head_dim in (32, 64, 96, 128, 160, 256):
            placed = [index for index in coordinates(head_dim, bits) if index >= 0]
            assert sorted(placed) == list(range(head_dim))


def test_few_rows_spread_over_the_gpu() -> None:
    assert launch_parameters(32 * 8, 132) is SMALL
    assert launch_parameters(1 << 20, 132) is LARGE


@pytest.mark.parametrize(
    ("head_dim", "capability", "warps"), [(64, 89, 2), (128, 89, 4), (256, 89, 4), (256, 80, 8), (256, 90, 8)]
)
def test_warps_share_a_part_of_the_matrix_that_fits(head_dim: int, capability: int, warps: int) -> None:
    layouts = VectorLayout(head_dim, 4, "int8"), RawLayout(head_dim, 2)
    assert fitted(SMALL, SHARED_MEMORY[capability], *layouts).num_warps == warps
