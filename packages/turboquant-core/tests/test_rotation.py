"""Signs by the written recurrence, and a rotation that is orthonormal and exactly inverted."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from turboquant_core import LayoutError, rotate, rotation_signs, unrotate
from turboquant_core.hadamard import hadamard_matrix, supported_order
from turboquant_core.rotation import rotation_matrix

HEAD_DIMS = (16, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512, 576)
MASK = (1 << 64) - 1


def splitmix64(state: int) -> int:
    """Output function of SplitMix64 (Steele, Lea, Flood 2014)."""
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
    return state ^ (state >> 31)


@pytest.mark.parametrize(("seed", "stream"), [(0, 0), (42, 0), (42, 1), (MASK, 1)])
def test_signs_follow_the_written_recurrence(seed: int, stream: int) -> None:
    first = (splitmix64(seed) + stream) & MASK
    states = [(first + (i + 1) * 0x9E3779B97F4A7C15) & MASK for i in range(96)]
    expected = [-1.0 if splitmix64(state) & (1 << 63) else 1.0 for state in states]
    assert rotation_signs(96, seed=seed, stream=stream).tolist() == expected


@pytest.mark.parametrize(
    ("seed", "stream", "expected"),
    [
        (0, 0, "-++-+++-+-+-----+-+----+--++---+"),
        (42, 0, "-+++-+++-+---++-+++-++-++-+--++-"),
        (42, 1, "+--+-----+++----+----+-+-++---++"),
        (MASK, 1, "++-++-++++++++-+++--+---+----++-"),
    ],
)
def test_signs_never_change(seed: int, stream: int, expected: str) -> None:
    """Also a shorter head_dim takes the first signs of a longer one."""
    for head_dim in (32, 128):
        signs = rotation_signs(head_dim, seed=seed, stream=stream)[:32].tolist()
        assert "".join("-" if sign < 0 else "+" for sign in signs) == expected


@pytest.mark.parametrize(("seed", "stream", "name"), [(-1, 0, "seed"), (1 << 64, 0, "seed"), (0, -1, "stream")])
def test_seed_and_stream_out_of_range(seed: int, stream: int, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        rotation_signs(64, seed=seed, stream=stream)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_orthonormal(head_dim: int) -> None:
    matrix = rotation_matrix(rotation_signs(head_dim)).double()
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(head_dim, dtype=torch.float64), rtol=0, atol=1e-6)
    magnitude = torch.full_like(matrix, head_dim**-0.5)
    torch.testing.assert_close(matrix.abs(), magnitude, rtol=1e-6, atol=0)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(head_dim=st.integers(2, 128).map(lambda n: 8 * n).filter(supported_order), seed=st.integers(0, MASK))
def test_fast_path_is_the_definition_in_float64(head_dim: int, seed: int) -> None:
    """``z = H diag(signs) x / sqrt(d)`` with the integer matrix, which shares no arithmetic with the fast transform."""
    x = np.random.default_rng(seed).standard_normal((3, head_dim))
    signs = rotation_signs(head_dim, seed=seed)
    expected = (x * signs.double().numpy()) @ hadamard_matrix(head_dim).T.astype(np.float64) / head_dim**0.5
    np.testing.assert_allclose(rotate(torch.from_numpy(x), signs).numpy(), expected, rtol=0, atol=1e-13)
    single = rotate(torch.from_numpy(x).float(), signs)
    assert single.dtype == torch.float32
    np.testing.assert_allclose(single.numpy(), expected, rtol=0, atol=1e-5)


@settings(derandomize=True, deadline=None, max_examples=30)
@given(head_dim=st.sampled_from(HEAD_DIMS), lead=st.lists(st.integers(0, 3), max_size=3), seed=st.integers(0, 999))
def test_fast_path_equals_the_matrix_and_inverts(head_dim: int, lead: list[int], seed: int) -> None:
    x = torch.randn(*lead, head_dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    signs = rotation_signs(head_dim, seed=seed)
    rotated = rotate(x, signs)
    assert rotated.dtype == torch.float64
    torch.testing.assert_close(rotated, x @ rotation_matrix(signs).double().T, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(unrotate(rotated, signs), x, rtol=1e-12, atol=1e-12)


def test_signs_are_fixed_balanced_and_differ_by_stream_and_seed() -> None:
    signs = rotation_signs(512, seed=7)
    assert torch.equal(signs, rotation_signs(512, seed=7))
    assert set(signs.tolist()) == {1.0, -1.0}
    assert abs(float(signs.sum())) < 5 * 512**0.5
    for other in (rotation_signs(512, seed=8), rotation_signs(512, seed=7, stream=1)):
        assert abs(float((signs * other).sum())) < 5 * 512**0.5


def test_half_input_becomes_float32_and_views_are_accepted() -> None:
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(0)).half().T
    rotated = rotate(x, rotation_signs(64))
    assert rotated.dtype == torch.float32
    assert torch.equal(rotated, rotate(x.contiguous(), rotation_signs(64)))


@pytest.mark.parametrize("head_dim", [0, 3, 23 * 8, 2048])
def test_unknown_order(head_dim: int) -> None:
    with pytest.raises(LayoutError, match=str(head_dim)):
        rotation_signs(head_dim)


@pytest.mark.parametrize("name", ["head_dim", "seed", "stream"])
@pytest.mark.parametrize("value", [1.5, 64.0, True, "1", None])
def test_what_is_no_integer(name: str, value: Any) -> None:
    rotation_signs(64)
    with pytest.raises(ValueError, match=re.escape(f"{name} is {value!r}; it must be an integer")):
        rotation_signs(**{"head_dim": 64, name: value})


def test_numbers_of_numpy_are_taken() -> None:
    signs = rotation_signs(np.int64(64), seed=np.uint64(2**64 - 1), stream=np.int8(1))
    assert torch.equal(signs, rotation_signs(64, seed=2**64 - 1, stream=1))


@pytest.mark.parametrize("x", [torch.zeros(2, 32), torch.zeros(2, 64, dtype=torch.int64), torch.zeros(())])
def test_bad_input(x: torch.Tensor) -> None:
    for operation in (rotate, unrotate):
        with pytest.raises(ValueError, match="tensor to rotate"):
            operation(x, rotation_signs(64))
