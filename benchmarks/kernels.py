"""Time the Triton kernels on a GPU beside 16-bit attention, in one run.

One decode step (prepare, attend, merge) over packed pages at 4, 3 and 2 bits; FlashAttention-3 from a vLLM build where
there is one; torch's SDPA; and the time that reading the packed bytes takes at the measured bandwidth. Then storing
keys and values: a decode append and a prefill. Medians of CUDA-graph replays, second-level cache flushed before each.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from report import table, write_json
from rivals import flash_attention_3, flash_attention_3_step, sdpa_step
from timing import microseconds, read_bandwidth
from torch import Tensor

from turboquant_core import CacheCodec, KernelProvider, KernelRequest, PageLayout, VectorLayout, load_provider

HERE = Path(__file__).parent
BITS = (4, 3, 2)
KV_HEADS = 8
SDPA_LARGEST_TOKENS = 1 << 18
APPEND_TOKENS = 32
PREFILL_TOKENS = 1 << 17


@dataclass(frozen=True)
class Shape:
    """A decode step: ``batch`` sequences of ``tokens``, ``group`` query heads for each of eight KV heads."""

    batch: int
    tokens: int
    group: int = 4
    head_dim: int = 128

    def __str__(self) -> str:
        return f"{self.batch} x {self.tokens // 1024}K, group {self.group}, head_dim {self.head_dim}"


SHAPES = (
    Shape(1, 4096),
    Shape(1, 32768),
    Shape(1, 131072),
    Shape(8, 32768),
    Shape(32, 8192),
    Shape(32, 32768),
    Shape(32, 32768, group=8),
    Shape(8, 32768, group=1),
    Shape(8, 32768, group=16),
    Shape(8, 32768, head_dim=64),
    Shape(8, 32768, head_dim=256),
)


def page_layout(shape: Shape, bits: int, page_size: int) -> PageLayout:
    """Keys and values at the same width."""
    key, value = VectorLayout(shape.head_dim, bits, "int8"), VectorLayout(shape.head_dim, bits, "cubic")
    return PageLayout(key, value, page_size=page_size, kv_heads=KV_HEADS)


def random_pages(layout: PageLayout, shape: Shape) -> tuple[Tensor, Tensor]:
    """Pages of random codes with scales of ordinary size, in random order."""
    count = shape.batch * layout.pages_for(shape.tokens)
    pages = torch.randint(0, 256, layout.pages_shape(count), dtype=torch.uint8, device="cuda")
    scales = pages[..., layout.key_scale_offset :]
    values = 0.06 + 0.05 * torch.rand(*scales.shape[:2], scales.shape[2] // 2, device="cuda")
    pages[..., layout.key_scale_offset :] = values.half().view(torch.uint8)
    return pages, torch.randperm(count, device="cuda").int().view(shape.batch, -1).contiguous()


def packed_step(provider: KernelProvider, shape: Shape, bits: int, page_size: int) -> Callable[[], Any]:
    """One decode step of ours, all memory given."""
    layout = page_layout(shape, bits, page_size)
    codec = CacheCodec.create(layout, device="cuda")
    pages, block_table = random_pages(layout, shape)
    query = torch.randn(shape.batch, KV_HEADS * shape.group, shape.head_dim, device="cuda", dtype=torch.bfloat16)
    lengths = torch.full((shape.batch,), shape.tokens, dtype=torch.int32, device="cuda")
    request = KernelRequest(layout, query.device, query.dtype, shape.group)
    size = provider.workspace_bytes(request, shape.batch, shape.batch)
    workspace, out = torch.empty(size, dtype=torch.uint8, device="cuda"), torch.empty_like(query)
    scaling = shape.head_dim**-0.5
    return lambda: provider.attend(
        query, pages, block_table, lengths, codec, scaling=scaling, out=out, workspace=workspace
    )


def dense_times(shape: Shape, forward: Callable[..., Any] | None) -> dict[str, float]:
    """FlashAttention-3 and SDPA over bfloat16 keys and values."""
    q = torch.randn(shape.batch, KV_HEADS * shape.group, shape.head_dim, device="cuda", dtype=torch.bfloat16)
    k = torch.randn(shape.batch, shape.tokens, KV_HEADS, shape.head_dim, device="cuda", dtype=torch.bfloat16)
    v = torch.randn_like(k)
    times = {}
    if forward is not None:
        times["fa3"] = microseconds(flash_attention_3_step(forward, q, k, v))
    if shape.batch * shape.tokens <= SDPA_LARGEST_TOKENS:
        times["sdpa"] = microseconds(sdpa_step(q, k, v))
    return times


def attention(provider: KernelProvider, shape: Shape, page_size: int, bandwidth: float, forward: Any) -> dict[str, Any]:
    """Microseconds of every contender for one shape."""
    row: dict[str, Any] = {"shape": str(shape), **dense_times(shape, forward)}
    torch.cuda.empty_cache()
    for bits in BITS:
        layout = page_layout(shape, bits, page_size)
        row[f"limit_{bits}"] = shape.batch * shape.tokens * KV_HEADS * layout.token_bytes / bandwidth * 1e6
        row[f"packed_{bits}"] = microseconds(packed_step(provider, shape, bits, page_size))
        torch.cuda.empty_cache()
    return row


def store(provider: KernelProvider, tokens: int, bits: int, page_size: int, bandwidth: float) -> dict[str, Any]:
    """Microseconds to pack keys and values of ``tokens`` tokens, beside the time to move their bytes."""
    layout = page_layout(Shape(1, tokens), bits, page_size)
    codec = CacheCodec.create(layout, device="cuda")
    pages = torch.zeros(layout.pages_shape(layout.pages_for(tokens)), dtype=torch.uint8, device="cuda")
    key, value = torch.randn(2, tokens, KV_HEADS, 128, device="cuda", dtype=torch.bfloat16)
    slots = torch.arange(tokens, device="cuda")
    moved = key.nbytes + value.nbytes + tokens * KV_HEADS * layout.token_bytes
    return {
        "tokens": tokens,
        "bits": bits,
        "limit": moved / bandwidth * 1e6,
        "store": microseconds(lambda: provider.store(key, value, pages, slots, codec)),
    }


def attention_table(rows: list[dict[str, Any]]) -> str:
    """Times and, where FlashAttention-3 ran, how many times faster ours is."""
    lines = []
    for row in rows:
        line = [row["shape"], *(f"{row[name]:.1f}" if name in row else "-" for name in ("fa3", "sdpa"))]
        for bits in BITS:
            ratio = f" ({row['fa3'] / row[f'packed_{bits}']:.2f}x)" if "fa3" in row else ""
            line.append(f"{row[f'packed_{bits}']:.1f} / {row[f'limit_{bits}']:.1f}{ratio}")
        lines.append(line)
    return table(["shape", "FA3 bf16", "SDPA bf16", *(f"{bits} bit / limit (FA3 / ours)" for bits in BITS)], lines)


def plot(rows: list[dict[str, Any]], target: Path) -> None:
    """Speed-up over FlashAttention-3, one group of bars for each shape."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(10, 4.5), layout="constrained")
    for offset, bits in enumerate(BITS):
        positions = [index + 0.27 * (offset - 1) for index in range(len(rows))]
        axes.bar(positions, [row["fa3"] / row[f"packed_{bits}"] for row in rows], width=0.25, label=f"{bits} bit")
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(rows)), [row["shape"].replace(", ", "\n") for row in rows], fontsize=7)
    axes.set_ylabel("times faster than FlashAttention-3 bf16")
    axes.legend()
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=120)
    plt.close(figure)


def replot(arguments: argparse.Namespace) -> None:
    """Draw the plot from the JSON of an earlier run; needs no GPU."""
    results = json.loads(arguments.json.read_text(encoding="utf-8"))["results"]
    plot(results[f"attention_page_{arguments.page_sizes[0]}"], arguments.plot)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fa3", type=Path, help="vLLM's _vllm_fa3_C shared library; an installed vLLM otherwise")
    parser.add_argument("--provider", default="triton")
    parser.add_argument("--page-sizes", type=int, nargs="+", default=[128, 16])
    parser.add_argument("--json", type=Path, default=HERE / "results" / "kernels.json")
    parser.add_argument("--plot", type=Path, default=HERE.parent / "docs" / "images" / "kernels.png")
    parser.add_argument("--replot", action="store_true", help="only draw the plot of the JSON file")
    arguments = parser.parse_args()
    if arguments.replot:
        replot(arguments)
        return
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device: these figures are of a GPU")
    provider = load_provider(arguments.provider)
    forward = flash_attention_3(arguments.fa3)
    bandwidth = read_bandwidth()
    print(f"{torch.cuda.get_device_name()}, read bandwidth {bandwidth / 1e12:.2f} TB/s, microseconds")
    print(f"FlashAttention-3: {'from vLLM' if forward is not None else 'not found'}")
    results: dict[str, Any] = {"bandwidth": bandwidth}
    for page_size in arguments.page_sizes:
        shapes = SHAPES if page_size == arguments.page_sizes[0] else SHAPES[:6]
        results[f"attention_page_{page_size}"] = rows = [
            attention(provider, shape, page_size, bandwidth, forward) for shape in shapes
        ]
        print(f"\npages of {page_size} tokens\n\n{attention_table(rows)}", flush=True)
    results["store"] = stores = [
        store(provider, tokens, bits, arguments.page_sizes[0], bandwidth)
        for tokens in (APPEND_TOKENS, PREFILL_TOKENS)
        for bits in BITS
    ]
    print("\n" + table(list(stores[0]), [list(row.values()) for row in stores]))
    write_json(arguments.json, results)
    if forward is not None:
        replot(arguments)


if __name__ == "__main__":
    main()
