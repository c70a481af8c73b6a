"""TurboQuantMSE: error of the codebook, true bytes, nothing lost."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

from turboquant_core import LayoutError, TurboQuantMSE, TurboQuantOutliers, TurboQuantProd, format_codebook
from turboquant_core.trellis import TurboQuantTrellis


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


@pytest.mark.parametrize("form", ["int8", "cubic"])
@pytest.mark.parametrize("other", [{"seed": 8}, {"bits": 3}, {"head_dim": 80}, {"form": None}])
def test_vectors_of_another_quantizer(form: Any, other: dict[str, Any]) -> None:
    arguments = {"head_dim": 64, "bits": 4, "seed": 7, "form": form}
    changed = {**arguments, **other}
    changed["form"] = changed["form"] or {"int8": "cubic", "cubic": "int8"}[form]
    packed = TurboQuantMSE(**changed).encode(torch.zeros(2, changed["head_dim"]))
    names = "seed 8, this quantizer reads seed 7" if "seed" in other else "layout VectorLayout"
    with pytest.raises(ValueError, match=f"packed with {names}.*: decode with the quantizer that packed them"):
        TurboQuantMSE(**arguments).decode(packed)


def test_a_scale_rule_does_not_matter_to_a_reader() -> None:
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(4))
    packed = TurboQuantMSE(64, 4, scale_rule="unbiased").encode(x)
    readers = [TurboQuantMSE(64, 4, scale_rule=rule).decode(packed) for rule in ("unbiased", "norm")]
    assert torch.equal(*readers)


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, True, "1", None])
def test_other_seeds_are_refused(seed: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"seed is {seed!r}; it must be an integer from 0 to")):
        TurboQuantMSE(64, 4, seed=seed)


@pytest.mark.parametrize(
    ("quantizer", "kind"),
    [
        (TurboQuantMSE(64, 4), "CompressedTensor"),
        (TurboQuantTrellis(64, 2), "CompressedTensor"),
        (TurboQuantProd(64, 3), "ProdTensor"),
        (TurboQuantOutliers(torch.arange(16), 64), "SplitTensor"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_what_was_not_encoded_is_not_decoded(quantizer: Any, kind: str) -> None:
    with pytest.raises(ValueError, match=rf"decoded is what encode\(\) gave, a {kind}; this is a Tensor"):
        quantizer.decode(torch.zeros(2, 64))


def test_numbers_of_numpy_are_taken() -> None:
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(4))
    packed = TurboQuantMSE(np.int64(64), np.int32(4), seed=np.int64(7)).encode(x)
    assert torch.equal(TurboQuantMSE(64, 4, seed=7).encode(x).packed.codes, packed.packed.codes)
    TurboQuantMSE(64, 4, seed=7).decode(packed)


SCALES = [2.0**exponent for exponent in (-13, -6, 0, 8, 15)]
"""Vectors of unit root mean square times these have scales that fp16 holds as normal numbers."""


def unit_vectors(n: int = 50) -> torch.Tensor:
    x = torch.randn(n, 64, generator=torch.Generator().manual_seed(5))
    return x / x.square().mean(-1, keepdim=True).sqrt()


def relative_error(quantizer: TurboQuantMSE, x: torch.Tensor) -> float:
    decoded = quantizer.decode(quantizer.encode(x))
    return float((decoded - x).double().norm() / x.double().norm())


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("scale", SCALES)
def test_sizes_whose_scale_is_a_normal_number(bits: int, scale: float) -> None:
    quantizer = TurboQuantMSE(64, bits)
    assert relative_error(quantizer, scale * unit_vectors()) == pytest.approx(
        relative_error(quantizer, unit_vectors()), rel=1e-3
    )


def test_small_vectors_lose_length_and_then_everything() -> None:
    quantizer, x = TurboQuantMSE(64, 4), unit_vectors()
    packed = quantizer.encode(1e-6 * x)
    # Multiples of 2**-24, which is 6 % of 1e-6.
    assert torch.equal(packed.packed.scales.double() * 2**24 % 1, torch.zeros(50).double())
    assert relative_error(quantizer, 1e-6 * x) < 0.12
    assert not quantizer.decode(quantizer.encode(2e-8 * x)).any()
    assert not quantizer.decode(quantizer.encode(torch.full((1, 64), 1e-45))).any()


@pytest.mark.parametrize("size", [1e6, 1e30, 3e37])
def test_large_vectors_keep_their_direction(size: float) -> None:
    quantizer, x = TurboQuantMSE(64, 4), unit_vectors()
    packed = quantizer.encode(size * x)
    assert (packed.packed.scales == 65504).all()
    decoded, expected = quantizer.decode(packed), quantizer.decode(quantizer.encode(x))
    assert decoded.isfinite().all()
    torch.testing.assert_close(*(torch.nn.functional.normalize(vectors, dim=-1) for vectors in (decoded, expected)))


def test_float64_beyond_float32_counts_as_infinite() -> None:
    quantizer, x = TurboQuantMSE(64, 4), unit_vectors(4).double()
    plain = quantizer.decode(quantizer.encode(x))
    x[1, 3], x[2] = 1e39, -1e300
    decoded = quantizer.decode(quantizer.encode(x))
    assert decoded.dtype == torch.float64
    assert decoded[1:3].isnan().all()
    assert torch.equal(decoded[[0, 3]], plain[[0, 3]])
    assert not quantizer.decode(quantizer.encode(torch.full((1, 64), 1e-300, dtype=torch.float64))).any()


def test_bad_input() -> None:
    with pytest.raises(LayoutError, match="bits is True"):
        TurboQuantMSE(64, True)
    with pytest.raises(ValueError, match=r"x is a list; it must be a torch\.Tensor"):
        TurboQuantMSE(64, 4).encode([0.0] * 64)  # type: ignore[arg-type]
    with pytest.raises(LayoutError, match="bits is 5"):
        TurboQuantMSE(64, 5)
    with pytest.raises(LayoutError, match="184"):
        TurboQuantMSE(184, 4)
    with pytest.raises(ValueError, match="head_dim = 64"):
        TurboQuantMSE(64, 4).encode(torch.zeros(2, 128))
    with pytest.raises(ValueError, match="int32"):
        TurboQuantMSE(64, 4).encode(torch.zeros(2, 64, dtype=torch.int32))
