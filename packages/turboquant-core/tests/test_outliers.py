"""The paper's split by channels: what it stores, what it gains, what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from turboquant_core import LayoutError, TurboQuantMSE, TurboQuantOutliers, format_codebook, outlier_channels

LOUD = torch.arange(3, 128, 4)


def keys(n: int, loudness: float, seed: int = 0) -> torch.Tensor:
    """Gaussian vectors whose 32 channels :data:`LOUD` are ``loudness`` times the others."""
    x = torch.randn(n, 128, generator=torch.Generator().manual_seed(seed))
    x[:, LOUD] *= loudness
    return x


def error(x: torch.Tensor, decoded: torch.Tensor) -> float:
    return float((decoded - x).square().sum() / x.square().sum())


def test_channels_with_the_most_energy_are_found() -> None:
    assert torch.equal(outlier_channels(keys(200, 3.0).view(10, 20, 128), 32), LOUD)


@pytest.mark.parametrize(("bits", "nbytes"), [((3, 2), 12 + 24 + 4), ((4, 3), 16 + 36 + 4)])
def test_true_bytes(bits: tuple[int, int], nbytes: int) -> None:
    quantizer = TurboQuantOutliers(LOUD, 128, bits)
    packed = quantizer.encode(keys(5, 2.0).half())
    assert quantizer.vector_bytes == nbytes
    assert packed.nbytes == 5 * nbytes
    assert packed.bits_per_coordinate == nbytes / 16
    decoded = quantizer.decode(packed)
    assert decoded.shape == (5, 128)
    assert decoded.dtype == torch.float16


@pytest.mark.parametrize("bits", [(3, 2), (4, 3)])
@pytest.mark.parametrize("loudness", [1.0, 4.0])
def test_error_is_that_of_the_two_codebooks(bits: tuple[int, int], loudness: float) -> None:
    x = keys(2000, loudness)
    quantizer = TurboQuantOutliers(LOUD, 128, bits)
    energy = torch.tensor([32 * loudness**2, 96.0])
    expected = torch.tensor([format_codebook("int8", width).mse for width in bits])
    gaussian = float((energy * expected).sum() / energy.sum())
    # Each part has its own scale, and 32 coordinates of known norm are narrower than 32 Gaussians.
    assert 0.88 * gaussian < error(x, quantizer.decode(quantizer.encode(x))) < gaussian


@pytest.mark.parametrize(("halves", "split"), [(2.5, (3, 2)), (3.5, (4, 3))])
def test_against_halves_of_rotated_coordinates(halves: float, split: tuple[int, int]) -> None:
    """By channels is better when a quarter of them has most of the energy, by rotated halves when none has."""
    quantizer = TurboQuantOutliers(LOUD, 128, split)
    packed = TurboQuantMSE(128, halves)
    alike, loud = keys(2000, 1.0), keys(2000, 4.0)
    by_channel = [error(x, quantizer.decode(quantizer.encode(x))) for x in (alike, loud)]
    by_half = [error(x, packed.decode(packed.encode(x))) for x in (alike, loud)]
    assert by_half[0] < 0.85 * by_channel[0]
    assert by_channel[1] < 0.85 * by_half[1]
    assert by_half[0] == pytest.approx(by_half[1], rel=0.05)


@pytest.mark.parametrize("other", [{"channels": LOUD - 1}, {"channels": LOUD.flip(0)}, {"seed": 1}, {"bits": (4, 3)}])
def test_vectors_of_another_quantizer(other: dict[str, Any]) -> None:
    arguments = {"channels": LOUD, "head_dim": 128}
    packed = TurboQuantOutliers(**arguments | other).encode(keys(2, 1.0))
    with pytest.raises(ValueError, match="these vectors were packed with"):
        TurboQuantOutliers(**arguments).decode(packed)


def test_shape_and_true_compression() -> None:
    packed = TurboQuantOutliers(LOUD, 128).encode(keys(6, 1.0).view(2, 3, 128).half())
    assert packed.shape == (2, 3, 128)
    assert packed.compression_ratio == pytest.approx(256 / (12 + 24 + 4))


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="channels is a list"):
        TurboQuantOutliers([0, 1], 128)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"channels is torch\.float32; it must hold integers"):
        TurboQuantOutliers(LOUD.float(), 128)
    with pytest.raises(ValueError, match="0 outlier channels of 128"):
        outlier_channels(keys(3, 1.0), 0)
    with pytest.raises(ValueError, match="must be finite"):
        outlier_channels(torch.full((3, 16), torch.nan), 8)
    with pytest.raises(ValueError, match="must be distinct"):
        TurboQuantOutliers(torch.tensor([1] * 32), 128)
    with pytest.raises(ValueError, match="below head_dim = 128"):
        TurboQuantOutliers(LOUD + 128, 128)
    with pytest.raises(LayoutError, match="head_dim is 20"):
        TurboQuantOutliers(torch.arange(20), 128)
    with pytest.raises(ValueError, match="head_dim = 128"):
        TurboQuantOutliers(LOUD, 128).encode(torch.zeros(2, 64))
