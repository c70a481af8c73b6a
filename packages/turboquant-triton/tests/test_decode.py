"""Packed vectors back to floats, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from turboquant_core import Codec, Packed, VectorLayout
from turboquant_core.reference import ReferenceProvider
from turboquant_core.testing.cases import random_vectors
from turboquant_core.testing.oracle import decode_oracle, relative_error
from turboquant_triton.device import multiprocessors
from turboquant_triton.kernels.decode import decode
from turboquant_triton.launch import LARGE


def packed_vectors(codec: Codec, lead: tuple[int, ...], device: torch.device) -> Packed:
    x = random_vectors(torch.Generator().manual_seed(3), (*lead, codec.layout.head_dim), torch.float32)
    return ReferenceProvider().encode(x.to(device), codec)


@pytest.mark.parametrize("form", ["int8", "cubic"])
@pytest.mark.parametrize(
    ("head_dim", "bits"),
    [(d, b) for d in (64, 80, 96, 112, 128, 160, 192, 256) for b in (2, 2.5, 3, 3.5, 4) if b == int(b) or d % 32 == 0],
)
def test_equals_float64(head_dim: int, bits: float, form: Any, device: torch.device) -> None:
    codec = Codec.create(VectorLayout(head_dim, bits, form), device=device)
    packed = packed_vectors(codec, (2, 9), device)
    assert relative_error(decode(packed, codec), decode_oracle(packed, codec)) <= 1e-6


@pytest.mark.parametrize(("head_dim", "bits"), [(64, 4), (128, 3), (160, 2), (256, 3), (256, 4), (256, 2.5)])
def test_many_rows(head_dim: int, bits: float, device: torch.device) -> None:
    codec = Codec.create(VectorLayout(head_dim, bits, "int8"), center=torch.randn(3, head_dim), device=device)
    packed = packed_vectors(codec, (LARGE.block * multiprocessors(device) // 3 + 1, 3), device)
    assert relative_error(decode(packed, codec), decode_oracle(packed, codec)) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dtypes_and_center(dtype: torch.dtype, device: torch.device) -> None:
    codec = Codec.create(VectorLayout(80, 3, "int8"), center=torch.randn(3, 80) * 4, device=device)
    packed = packed_vectors(codec, (5, 3), device)
    got = decode(packed, codec, dtype)
    assert got.dtype == dtype
    expected = ReferenceProvider().decode(packed, codec, torch.float32)
    torch.testing.assert_close(got, expected.to(dtype), rtol=2 * torch.finfo(dtype).eps + 1e-6, atol=1e-4)


def test_scales_pass_through(device: torch.device) -> None:
    codec = Codec.create(VectorLayout(64, 4, "cubic"), device=device)
    packed = packed_vectors(codec, (4,), device)
    packed.scales[1], packed.scales[2], packed.scales[3] = 0, torch.nan, 65504
    got = decode(packed, codec)
    assert not got[1].any()
    assert got[2].isnan().all()
    assert got[[0, 3]].isfinite().all()


@pytest.mark.parametrize("bits", [2, 2.5, 3, 3.5, 4])
def test_views_and_empty(bits: float, device: torch.device) -> None:
    codec = Codec.create(VectorLayout(96, bits, "int8"), device=device)
    packed = packed_vectors(codec, (4, 3), device)
    expected = decode(packed, codec)
    shifted = torch.empty(packed.codes.numel() + 1, dtype=torch.uint8, device=device)
    odd = shifted[1:].view(packed.codes.shape)
    odd.copy_(packed.codes)
    assert torch.equal(decode(Packed(odd, packed.scales), codec), expected)
    flipped = Packed(packed.codes.transpose(0, 1), packed.scales.transpose(0, 1))
    assert torch.equal(decode(flipped, codec), expected.transpose(0, 1))
    assert decode(Packed(packed.codes[:0], packed.scales[:0]), codec).shape == (0, 3, 96)


def test_wrong_input_is_refused(device: torch.device) -> None:
    codec = Codec.create(VectorLayout(64, 4, "int8"), device=device)
    packed = packed_vectors(codec, (4,), device)
    with pytest.raises(ValueError, match="code_bytes = 32"):
        decode(Packed(packed.codes[:, 1:], packed.scales), codec)
    with pytest.raises(ValueError, match="float16"):
        decode(Packed(packed.codes, packed.scales.float()), codec)
