"""Algorithm 2: unbiased, with the paper's distortion, in the bytes it claims."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch

from turboquant_core import LayoutError, ProdTensor, TurboQuantProd, lloyd_max
from turboquant_core.prod import gaussian_projection

PAPER = {1: 1.57, 2: 0.56, 3: 0.18, 4: 0.047}
"""D_prod times d as the paper prints it (Theorem 2)."""


def distortion_times_dim(bits: int, head_dim: int) -> float:
    """``pi / 2 * D_mse(bits - 1)``: the bound of Theorem 2, met for random vectors."""
    return math.pi / 2 * (1.0 if bits == 1 else lloyd_max(bits - 1, head_dim).mse)


def unit_vectors(n: int, head_dim: int, seed: int) -> torch.Tensor:
    x = torch.randn(n, head_dim, generator=torch.Generator().manual_seed(seed))
    return x / x.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_unbiased_over_seeds(bits: int) -> None:
    x, y = unit_vectors(2, 64, 0)
    # A pair with a large inner product: there a biased estimator shows.
    y = (x + 0.5 * y) / (x + 0.5 * y).norm()
    estimates = []
    for seed in range(300):
        quantizer = TurboQuantProd(64, bits, seed=seed)
        estimates.append(quantizer.inner_product(y[None], quantizer.encode(x[None])))
    estimate = torch.cat(estimates).flatten().double()
    error = estimate.mean() - (x @ y).double()
    assert abs(error) < 4 * estimate.std() / math.sqrt(len(estimate))


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_distortion_of_the_paper(bits: int) -> None:
    head_dim = 128
    x, y = unit_vectors(400, head_dim, 1), unit_vectors(400, head_dim, 2)
    distortion = torch.zeros(())
    for seed in range(4):
        quantizer = TurboQuantProd(head_dim, bits, seed=seed)
        distortion += (quantizer.inner_product(y, quantizer.encode(x)) - y @ x.T).square().mean() / 4
    assert float(distortion) * head_dim == pytest.approx(distortion_times_dim(bits, head_dim), rel=0.06)
    # The paper rounds D_mse down before it multiplies by pi / 2: 13 % at 4 bits.
    assert float(distortion) * head_dim == pytest.approx(PAPER[bits], rel=0.15)
    assert distortion <= math.sqrt(3) * math.pi**2 / head_dim * 4.0**-bits


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_bytes_and_decode(bits: int) -> None:
    quantizer = TurboQuantProd(96, bits)
    x = torch.randn(3, 5, 96, generator=torch.Generator().manual_seed(3)) * 7
    packed = quantizer.encode(x)
    assert packed.nbytes == 15 * (96 * bits // 8 + 8)
    query = torch.randn(3, 2, 96, generator=torch.Generator().manual_seed(4))
    # inner_product never decodes: it rotates and projects the query.
    expected = query.double() @ quantizer.decode(packed).double().transpose(-1, -2)
    torch.testing.assert_close(quantizer.inner_product(query, packed).double(), expected, rtol=1e-5, atol=1e-3)
    again = TurboQuantProd(96, bits).encode(x)
    for name in ("codes", "signs", "norm", "residual"):
        assert torch.equal(getattr(packed, name), getattr(again, name))


def test_projection_is_the_written_recurrence() -> None:
    projection = gaussian_projection(64, 42)
    # Philox 4x64-10 with the key 42 begins with 15129985323320379406 and 3490965594592278910.
    outputs = torch.tensor([15129985323320379406 >> 11, 3490965594592278910 >> 11], dtype=torch.float64)
    expected = torch.special.ndtri((outputs + 0.5) * 2.0**-53).float()
    torch.testing.assert_close(projection[0, :2], expected)
    assert abs(float(projection.mean())) < 4 / 64
    assert float(projection.var()) == pytest.approx(1, abs=4 * math.sqrt(2) / 64)
    assert not torch.equal(projection, gaussian_projection(64, 43))


@pytest.mark.parametrize("bits", [1, 3])
def test_zero_and_nonfinite_vectors(bits: int) -> None:
    quantizer = TurboQuantProd(64, bits)
    x = unit_vectors(4, 64, 5)
    x[0], x[1, 3], x[2, 7] = 0, math.nan, math.inf
    packed = quantizer.encode(x)
    assert isinstance(packed, ProdTensor)
    decoded, scores = quantizer.decode(packed), quantizer.inner_product(x[3:], packed)[0]
    assert not decoded[0].any()
    assert decoded[1:3].isnan().all()
    assert float(scores[0]) == 0
    assert scores[1:3].isnan().all()
    torch.testing.assert_close(decoded[3:], quantizer.decode(quantizer.encode(x[3:])))


def test_no_vectors() -> None:
    quantizer = TurboQuantProd(64, 1)
    packed = quantizer.encode(torch.zeros(0, 64))
    assert packed.nbytes == 0
    assert quantizer.inner_product(torch.zeros(2, 64), packed).shape == (2, 0)


@pytest.mark.parametrize("bits", [0, 5, 2.0, 2.5, True, "2", None])
def test_other_bits_are_refused(bits: Any) -> None:
    TurboQuantProd(64, 2)  # a cache of codebooks takes 2.0 for 2
    message = f"bits is {bits!r}; Algorithm 2 is implemented for (1, 2, 3, 4): choose one of them"
    with pytest.raises(ValueError, match=re.escape(message)):
        TurboQuantProd(64, bits)


def test_numbers_of_numpy_are_taken() -> None:
    assert TurboQuantProd(np.int64(64), np.int8(2), seed=np.uint64(2**63)).bits == 2


def test_bad_input() -> None:
    quantizer = TurboQuantProd(64, 2)
    with pytest.raises(ValueError, match="last dimension 64"):
        quantizer.encode(torch.zeros(2, 32))
    with pytest.raises(ValueError, match="int64"):
        quantizer.encode(torch.zeros(2, 64, dtype=torch.int64))
    with pytest.raises(ValueError, match="query"):
        quantizer.inner_product(torch.zeros(1, 8), quantizer.encode(torch.zeros(1, 64)))
    with pytest.raises(ValueError, match="head_dim is 20"):
        TurboQuantProd(20, 2)
    with pytest.raises(LayoutError, match="head_dim is 2048"):
        TurboQuantProd(2048, 2)
    with pytest.raises(ValueError, match=r"head_dim is 64\.0; it must be an integer"):
        TurboQuantProd(64.0, 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"x is a list; it must be a torch\.Tensor"):
        quantizer.encode([0.0] * 64)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="x is on meta, the quantizer on cpu"):
        quantizer.encode(torch.zeros(2, 64, device="meta"))
    with pytest.raises(ValueError, match="seed is -1"):
        TurboQuantProd(64, 2, seed=-1)


@pytest.mark.parametrize("other", [(64, 3, 42), (32, 2, 42), (64, 2, 43), (64, 1, 42)])
def test_vectors_of_another_quantizer(other: tuple[int, int, int]) -> None:
    quantizer = TurboQuantProd(*other)
    packed = quantizer.encode(torch.zeros(1, quantizer.head_dim))
    message = "packed with head_dim {}, {} bits and seed {}; this quantizer has head_dim 64, 2 bits and seed 42"
    for use in (TurboQuantProd(64, 2).decode, lambda x: TurboQuantProd(64, 2).inner_product(torch.zeros(1, 64), x)):
        with pytest.raises(ValueError, match=message.format(*other)):
            use(packed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_true_compression(dtype: torch.dtype) -> None:
    packed = TurboQuantProd(128, 3).encode(torch.ones(2, 5, 128, dtype=dtype))
    assert packed.shape == (2, 5, 128)
    assert (packed.head_dim, packed.bits) == (128, 3)
    assert packed.compression_ratio == pytest.approx(128 * dtype.itemsize / (48 + 8))
    assert TurboQuantProd(128, 3).encode(torch.zeros(0, 128)).compression_ratio == 1.0


@pytest.mark.parametrize("exponent", [-100, -60, 60, 110])
def test_sizes_whose_squares_leave_float32(exponent: int) -> None:
    quantizer = TurboQuantProd(64, 3)
    x = unit_vectors(3, 64, 6)
    plain = quantizer.decode(quantizer.encode(x))
    assert torch.equal(quantizer.decode(quantizer.encode(x * 2.0**exponent)), plain * 2.0**exponent)


def test_float64_beyond_float32_counts_as_infinite() -> None:
    x = unit_vectors(2, 64, 7).double()
    x[1, 3] = 1e39
    decoded = TurboQuantProd(64, 3).decode(TurboQuantProd(64, 3).encode(x))
    assert decoded[0].isfinite().all()
    assert decoded[1].isnan().all()
