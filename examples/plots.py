"""The demo's picture."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt


def plot_memory(series: dict[int | None, list[tuple[int, int]]], target: Path) -> Path:
    """Draw bytes of the cache against context, one line for each width; returns ``target``."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for bits, points in series.items():
        contexts, sizes = zip(*points, strict=True)
        label = "16 bit (ordinary cache)" if bits is None else f"{bits} bit"
        axes.plot(contexts, [size / 2**20 for size in sizes], marker="o", label=label)
    axes.set(xlabel="context (tokens)", ylabel="KV cache (MiB)", title="KV cache of the demo's model")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=150)
    plt.close(figure)
    return target
