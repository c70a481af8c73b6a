"""What encoding costs: nearest codes, the best of five magnifications, and shaped codes, by the PyTorch reference.

Vectors are Gaussian, keys of one KV head; weights are a random second moment. Median of a few calls for each count.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from report import table, write_json

from turboquant_core import Codec, ReferenceProvider, VectorLayout
from turboquant_core.shaping import shaped

HERE = Path(__file__).parent
REFERENCE = ReferenceProvider()


def codecs(head_dim: int, bits: float, device: str) -> dict[str, Codec]:
    """The three ways to choose codes."""
    layout = VectorLayout(head_dim, bits, "int8")
    factor = torch.randn(1, head_dim, head_dim, generator=torch.Generator().manual_seed(0))
    searched = Codec.create(layout, scale_rule="searched", device=device)
    return {
        "nearest codes": Codec.create(layout, scale_rule="unbiased", device=device),
        "searched codes": searched,
        "shaped codes": shaped(searched, (factor @ factor.mT).to(device)),
    }


def seconds(codec: Codec, vectors: torch.Tensor, repeats: int) -> float:
    """Median time of a call."""
    found = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        REFERENCE.encode(vectors, codec)
        if vectors.is_cuda:
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return median(found[1:])


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=int, nargs="+", default=[1, 64, 1024, 16384])
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--bits", type=float, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "shaping_time.json")
    arguments = parser.parse_args()
    ways = codecs(arguments.head_dim, arguments.bits, arguments.device)
    rows: list[dict[str, Any]] = []
    for count in arguments.vectors:
        x = torch.randn(count, 1, arguments.head_dim, device=arguments.device)
        times = {name: 1000 * seconds(codec, x, arguments.repeats) for name, codec in ways.items()}
        rows.append({"vectors": count, **times})
    write_json(arguments.json, {"head_dim": arguments.head_dim, "bits": arguments.bits, "ms": rows}, arguments.device)
    print(table(["vectors", *(f"{name}, ms" for name in ways)], [list(row.values()) for row in rows]))


if __name__ == "__main__":
    main()
