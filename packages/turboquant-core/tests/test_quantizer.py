"""TurboQuantMSE: error of the codebook, true bytes, nothing lost."""

from __future__ import annotations

import pytest
import torch

from turboquant_core import LayoutError, TurboQuantMSE, format_codebook


@pytest.mark.parametrize("bits", [2, 2.5, 3, 3.5, 4])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_error_is_the_codebooks(head_dim: int, bits: float) -> None:
    x = torch.randn(800, head_dim, generator=torch.Generator().manual_seed(0)) * 3
    quantizer = TurboQuantMSE(head_dim, bits)
    error = (quantizer.decode(quantizer.encode(x)) - x).square().sum() / x.square().sum()
    expected = [format_codebook("cubic", part.width).mse for part in quantizer.codec.layout.parts]
    assert float(error) == pytest.approx(sum(expected) / len(expected), rel=0.1)
    assert quantizer.bits == bits


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_bytes_shape_dtype(dtype: torch.dtype) -> None:
    quantizer = TurboQuantMSE(128, 3, seed=9)
    x = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(1)).to(dtype)
    packed = quantizer.encode(x)
    assert packed.shape == x.shape
    assert packed.nbytes == 10 * (48 + 2)
    assert packed.compression_ratio == pytest.approx(128 * dtype.itemsize / 50)
    decoded = quantizer.decode(packed)
    assert decoded.shape == x.shape
    assert decoded.dtype == dtype


def test_deterministic_and_seeded() -> None:
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(2))
    decode = [TurboQuantMSE(64, 4, seed=seed) for seed in (1, 1, 2)]
    first, again, other = (quantizer.decode(quantizer.encode(x)) for quantizer in decode)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_no_vectors() -> None:
    quantizer = TurboQuantMSE(64, 4)
    packed = quantizer.encode(torch.zeros(0, 64))
    assert packed.nbytes == 0
    assert quantizer.decode(packed).shape == (0, 64)


def test_bad_input() -> None:
    with pytest.raises(LayoutError, match="bits is 5"):
        TurboQuantMSE(64, 5)
    with pytest.raises(LayoutError, match="184"):
        TurboQuantMSE(184, 4)
    with pytest.raises(ValueError, match="head_dim = 64"):
        TurboQuantMSE(64, 4).encode(torch.zeros(2, 128))
    with pytest.raises(ValueError, match="int32"):
        TurboQuantMSE(64, 4).encode(torch.zeros(2, 64, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"64|128"):
        TurboQuantMSE(128, 4).decode(TurboQuantMSE(64, 4).encode(torch.zeros(2, 64)))
