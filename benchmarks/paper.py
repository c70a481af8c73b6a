"""Reproduce the figures of the paper (arXiv 2504.19874) on a CPU.

Distortion of vectors and of inner products on the unit sphere against the paper's bounds, bias and variance of inner
products for every scale rule, nearest-neighbour recall against product quantization, and the error of fractional bits
and of trellis codes at true bits.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from report import table, write_json
from scipy.cluster.vq import kmeans2, vq
from torch import Tensor

from turboquant_core import (
    Codec,
    ReferenceProvider,
    TurboQuantMSE,
    TurboQuantOutliers,
    TurboQuantProd,
    VectorLayout,
    lloyd_max,
    outlier_channels,
    rotate,
    rotation_signs,
    unrotate,
)
from turboquant_core.layout import BITS as LAYOUT_BITS
from turboquant_core.scale import SCALE_RULES
from turboquant_core.trellis import TRELLIS_BITS, TurboQuantTrellis

HERE = Path(__file__).parent
BITS = (1, 2, 3, 4)
REFINED = {1: 0.36, 2: 0.117, 3: 0.03, 4: 0.009}
"""D_mse as the paper prints it for small widths (Theorem 1)."""
INNER_PRODUCTS = (0.0, 0.3, 0.6, 0.9)
RECALL_AT = (1, 4, 16, 64)
SUBVECTOR = 4
CENTROIDS = 256
CURVES = (("_bound", "paper's bound", "--"), ("", "measured", "o-"), ("_limit", "Shannon limit", ":"))


def unit_vectors(n: int, dim: int, seed: int) -> Tensor:
    """Uniform points on the unit sphere, ``[n, dim]``."""
    x = torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))
    return x / x.norm(dim=-1, keepdim=True)


def quantize_textbook(x: Tensor, bits: int, seed: int) -> Tensor:
    """The paper's Algorithm 1: rotate, nearest Lloyd-Max level of the exact coordinate density, rotate back."""
    dim = x.shape[-1]
    levels, boundaries = lloyd_max(bits, dim).tensors()
    signs = rotation_signs(dim, seed=seed)
    codes = torch.bucketize((rotate(x, signs) * math.sqrt(dim)).contiguous(), boundaries)
    return unrotate(levels[codes] / math.sqrt(dim), signs)


def distortions(dim: int, n: int, seed: int) -> list[dict[str, float]]:
    """Measured D_mse and D_prod beside the paper's upper bounds and the Shannon limits."""
    x, y = unit_vectors(n, dim, seed), unit_vectors(n, dim, seed + 1)
    exact, rows = y @ x.T, []
    for bits in BITS:
        prod = TurboQuantProd(dim, bits, seed=seed)
        rows.append(
            {
                "bits": bits,
                "mse": float((quantize_textbook(x, bits, seed) - x).square().sum(-1).mean()),
                "mse_paper": REFINED[bits],
                "mse_bound": math.sqrt(3) * math.pi / 2 * 4.0**-bits,
                "mse_limit": 4.0**-bits,
                "prod": float((prod.inner_product(y, prod.encode(x)) - exact).square().mean()),
                "prod_formula": math.pi / 2 / dim * (1.0 if bits == 1 else lloyd_max(bits - 1, dim).mse),
                "prod_bound": math.sqrt(3) * math.pi**2 / dim * 4.0**-bits,
                "prod_limit": 4.0**-bits / dim,
            }
        )
    return rows


def estimators(dim: int, seed: int) -> dict[str, Any]:
    """Name to a function that maps vectors to their estimates, for bias and variance."""

    def packed(bits: int, rule: Any) -> Any:
        codec = Codec.create(VectorLayout(dim, bits, "int8"), seed=seed, scale_rule=rule)
        return lambda x: ReferenceProvider().decode(ReferenceProvider().encode(x, codec), codec)

    def prod(bits: int) -> Any:
        quantizer = TurboQuantProd(dim, bits, seed=seed)
        return lambda x: quantizer.decode(quantizer.encode(x))

    found = {f"{bits} bit, {rule}": packed(bits, rule) for bits in (2, 3, 4) for rule in SCALE_RULES}
    return found | {f"{bits} bit, Algorithm 2": prod(bits) for bits in (2, 3, 4)}


def bias_and_variance(dim: int, n: int, seed: int) -> list[dict[str, Any]]:
    """Mean and variance of the error of ``<y, x>`` for pairs with a given inner product."""
    x, noise = unit_vectors(n, dim, seed), unit_vectors(n, dim, seed + 1)
    orthogonal = noise - (noise * x).sum(-1, keepdim=True) * x
    orthogonal = orthogonal / orthogonal.norm(dim=-1, keepdim=True)
    rows = []
    for name, estimate in estimators(dim, seed).items():
        decoded = estimate(x)
        for target in INNER_PRODUCTS:
            y = target * x + math.sqrt(1 - target**2) * orthogonal
            error = (y * decoded).sum(-1) - (y * x).sum(-1)
            rows.append(
                {"codec": name, "inner_product": target, "bias": float(error.mean()), "variance": float(error.var())}
            )
    return rows


def clustered(n: int, dim: int, seed: int) -> Tensor:
    """Unit vectors around random centres, ``[n, dim]``."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(64, dim, generator=generator)
    x = centres[torch.randint(0, 64, (n,), generator=generator)] + 0.8 * torch.randn(n, dim, generator=generator)
    return x / x.norm(dim=-1, keepdim=True)


def product_quantization(x: Tensor, seed: int) -> tuple[Tensor, float]:
    """Estimates from k-means codebooks of one byte for each four coordinates (2 bits a coordinate), and CPU seconds."""
    start = time.process_time()
    parts = []
    for part in x.numpy().reshape(len(x), -1, SUBVECTOR).swapaxes(0, 1):
        centroids, _ = kmeans2(part, CENTROIDS, iter=8, minit="points", rng=np.random.default_rng(seed))
        parts.append(centroids[vq(part, centroids)[0]])
    return torch.from_numpy(np.concatenate(parts, axis=1)), time.process_time() - start


def recall(estimates: Tensor, x: Tensor, queries: Tensor) -> dict[int, float]:
    """Share of queries whose true nearest vector is among the ``k`` best by estimated inner product."""
    truth = (queries @ x.T).argmax(-1, keepdim=True)
    best = (queries @ estimates.T).topk(max(RECALL_AT), dim=-1).indices
    return {k: float((best[:, :k] == truth).any(-1).float().mean()) for k in RECALL_AT}


def nearest_neighbours(dim: int, n: int, seed: int) -> list[dict[str, Any]]:
    """Recall and CPU seconds to encode of each method over the same vectors."""
    x, queries = clustered(n, dim, seed), clustered(max(n // 20, 50), dim, seed + 1)
    rows = []
    for bits in (2, 4):
        quantizer = TurboQuantProd(dim, bits, seed=seed)
        start = time.process_time()
        packed = quantizer.encode(x)
        seconds = time.process_time() - start
        rows.append(
            {"method": f"Algorithm 2, {bits} bit", "seconds": seconds, **recall(quantizer.decode(packed), x, queries)}
        )
        codec = Codec.create(VectorLayout(dim, bits, "int8"), seed=seed)
        start = time.process_time()
        coded = ReferenceProvider().encode(x, codec)
        seconds = time.process_time() - start
        decoded = ReferenceProvider().decode(coded, codec)
        rows.append({"method": f"packed format, {bits} bit", "seconds": seconds, **recall(decoded, x, queries)})
    estimates, seconds = product_quantization(x, seed)
    rows.append({"method": "product quantization, 2 bit", "seconds": seconds, **recall(estimates, x, queries)})
    return rows


def loud_channels(n: int, dim: int, seed: int) -> Tensor:
    """Gaussian vectors, a quarter of whose channels are four times the others, ``[n, dim]``."""
    x = torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))
    x[:, ::4] *= 4
    return x


def small_codecs(dim: int, seed: int, calibration: Tensor) -> dict[str, Any]:
    """Name to a quantizer, those of the paper's split with the loudest quarter of the calibration vectors' channels."""
    channels = outlier_channels(calibration, dim // 4)
    found: dict[str, Any] = {}
    for bits in LAYOUT_BITS:
        found[f"packed format, {bits} bit"] = TurboQuantMSE(dim, bits, seed=seed)
    for low in (2, 3):
        name = f"outlier channels, {low + 1} and {low} bit"
        found[name] = TurboQuantOutliers(channels, dim, (low + 1, low), seed=seed)
    return found | {f"trellis, {bits} bit": TurboQuantTrellis(dim, bits, seed=seed) for bits in TRELLIS_BITS}


def fractional_bits(dim: int, n: int, seed: int) -> list[dict[str, Any]]:
    """Relative squared error at true bits, of vectors with alike channels and of vectors with loud ones."""
    sources = {"alike": torch.randn(n, dim, generator=torch.Generator().manual_seed(seed + 2))}
    sources["loud"] = loud_channels(n, dim, seed + 3)
    calibration = loud_channels(n // 4, dim, seed + 4)
    rows = []
    for name, quantizer in small_codecs(dim, seed, calibration).items():
        row: dict[str, Any] = {"codec": name}
        start = time.process_time()
        packed = {source: quantizer.encode(x) for source, x in sources.items()}
        row["true_bits"] = 8 * packed["alike"].nbytes / sources["alike"].numel()
        seconds = time.process_time() - start
        for source, x in sources.items():
            row[source] = float((quantizer.decode(packed[source]) - x).square().sum() / x.square().sum())
        rows.append(row | {"encode_ms_a_vector": 1000 * seconds / (len(sources) * n)})
    return sorted(rows, key=lambda row: float(row["true_bits"]))


def plot(results: dict[str, Any], target: Path) -> None:
    """D_mse and D_prod against bits, with bound and limit."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, kind, title in zip(axes, ("mse", "prod"), ("vectors (D_mse)", "inner products (D_prod)"), strict=True):
        rows = results["distortions"]
        for suffix, label, style in (
            ("_bound", "paper's bound", "--"),
            ("", "measured", "o-"),
            ("_limit", "limit", ":"),
        ):
            axis.semilogy([r["bits"] for r in rows], [r[kind + suffix] for r in rows], style, label=label)
        axis.set(xlabel="bits per coordinate", ylabel="distortion", title=title, xticks=BITS)
        axis.grid(alpha=0.3)
        axis.legend()
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=120)
    plt.close(figure)


def show(results: dict[str, Any]) -> None:
    """Print every table."""
    for name, rows in results.items():
        print(f"\n{name.replace('_', ' ')}\n")
        print(table([str(key) for key in rows[0]], [list(row.values()) for row in rows]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--vectors", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="few vectors, no files")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "paper.json")
    parser.add_argument("--plot", type=Path, default=HERE.parent / "docs" / "images" / "paper.png")
    arguments = parser.parse_args()
    n = 600 if arguments.quick else arguments.vectors
    results = {
        "distortions": distortions(arguments.dim, n, arguments.seed),
        "bias_and_variance": bias_and_variance(arguments.dim, n, arguments.seed),
        "nearest_neighbours": nearest_neighbours(arguments.dim, n, arguments.seed),
        "fractional_bits": fractional_bits(arguments.dim, n, arguments.seed),
    }
    show(results)
    if not arguments.quick:
        write_json(arguments.json, results)
        plot(results, arguments.plot)


if __name__ == "__main__":
    main()
