"""Algorithm 2: unbiased, with the paper's distortion, in the bytes it claims."""

from __future__ import annotations

import math

import pytest
import torch

from turboquant_core import ProdTensor, TurboQuantProd, lloyd_max


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


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_bytes_and_decode(bits: int) -> None:
    quantizer = TurboQuantProd(96, bits)
    x = torch.randn(3, 5, 96, generator=torch.Generator().manual_seed(3)) * 7
    packed = quantizer.encode(x)
    assert packed.nbytes == 15 * (96 * bits // 8 + 8)
    query = torch.randn(3, 2, 96, generator=torch.Generator().manual_seed(4))
    expected = query @ quantizer.decode(packed).transpose(-1, -2)
    torch.testing.assert_close(quantizer.inner_product(query, packed), expected)
    again = TurboQuantProd(96, bits).encode(x)
    for name in ("codes", "signs", "norm", "residual"):
        assert torch.equal(getattr(packed, name), getattr(again, name))


def test_zero_vector() -> None:
    quantizer = TurboQuantProd(64, 3)
    packed = quantizer.encode(torch.zeros(2, 64))
    assert isinstance(packed, ProdTensor)
    assert not quantizer.decode(packed).any()


@pytest.mark.parametrize("bits", [0, 5])
def test_bits_out_of_range(bits: int) -> None:
    with pytest.raises(ValueError, match=f"bits is {bits}"):
        TurboQuantProd(64, bits)


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
