"""Scores against packed keys, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from turboquant_core import Codec, Packed, VectorLayout
from turboquant_core.reference import ReferenceProvider
from turboquant_core.testing.cases import random_vectors
from turboquant_core.testing.oracle import decode_oracle, relative_error
from turboquant_triton.kernels.scores import scores


def packed_keys(codec: Codec, lead: tuple[int, ...], device: torch.device) -> Packed:
    x = random_vectors(torch.Generator().manual_seed(3), (*lead, codec.layout.head_dim), torch.float32)
    return ReferenceProvider().encode(x.to(device), codec)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("form", ["int8", "cubic"])
@pytest.mark.parametrize(
    ("head_dim", "bits"),
    [(d, b) for d in (64, 80, 96, 112, 128, 160, 192, 256) for b in (2, 2.5, 3, 3.5, 4) if b == int(b) or d % 32 == 0],
)
def test_equals_float64(head_dim: int, bits: float, form: Any, dtype: torch.dtype, device: torch.device) -> None:
    codec = Codec.create(VectorLayout(head_dim, bits, form), device=device)
    packed = packed_keys(codec, (2, 37), device)
    query = random_vectors(torch.Generator().manual_seed(4), (2, 3, head_dim), dtype).to(device)
    got = scores(query, packed, codec, scaling=0.25)
    keys = decode_oracle(packed, codec, centered=True)
    assert got.dtype == torch.float32
    assert relative_error(got, 0.25 * query.cpu().double().numpy() @ keys.swapaxes(-1, -2)) <= 2e-6


def test_many_keys_and_queries(device: torch.device) -> None:
    codec = Codec.create(VectorLayout(64, 4, "int8"), center=torch.randn(2, 64), device=device)
    packed = packed_keys(Codec.create(codec.layout, device=device), (1, 2, 700), device)
    query = torch.randn(1, 2, 35, 64, device=device)
    expected = ReferenceProvider().scores(query, packed, codec, scaling=1.0)
    torch.testing.assert_close(scores(query, packed, codec, scaling=1.0), expected, rtol=1e-4, atol=1e-3)


def test_leading_dimensions_broadcast(device: torch.device) -> None:
    codec = Codec.create(VectorLayout(64, 3, "int8"), device=device)
    packed = packed_keys(codec, (2, 1, 9), device)
    query = torch.randn(2, 4, 5, 64, device=device).transpose(1, 2)[:, :3]
    expected = ReferenceProvider().scores(query, packed, codec, scaling=0.5)
    got = scores(query, packed, codec, scaling=0.5)
    assert got.shape == expected.shape
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e30])
def test_extreme_queries(value: float, device: torch.device) -> None:
    codec = Codec.create(VectorLayout(64, 4, "int8"), device=device)
    packed = packed_keys(codec, (9,), device)
    query = torch.randn(2, 64, device=device) * value
    expected = ReferenceProvider().scores(query, packed, codec, scaling=0.5)
    torch.testing.assert_close(scores(query, packed, codec, scaling=0.5), expected, rtol=1e-4, atol=1e-5 * value)


def test_nan_stays_in_its_row_and_column(device: torch.device) -> None:
    codec = Codec.create(VectorLayout(64, 4, "int8"), device=device)
    packed = packed_keys(codec, (9,), device)
    packed.scales[4] = torch.nan
    query = torch.randn(3, 64, device=device)
    query[1, 0] = torch.nan
    got = scores(query, packed, codec, scaling=1.0).isnan()
    expected = torch.zeros_like(got)
    expected[1], expected[:, 4] = True, True
    assert torch.equal(got, expected)


def test_empty(device: torch.device) -> None:
    codec = Codec.create(VectorLayout(64, 4, "int8"), device=device)
    packed = packed_keys(codec, (0,), device)
    assert scores(torch.randn(3, 64, device=device), packed, codec, scaling=1.0).shape == (3, 0)
