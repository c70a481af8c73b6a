"""Time the Triton kernels on a GPU beside 16-bit attention, in one run.

One decode step (prepare, attend, merge) over packed pages at 4, 3 and 2 bits, and the time that reading the packed
bytes takes at the measured bandwidth. Beside it whatever is installed: FlashAttention-3 from a vLLM build, else
FlashAttention-2; torch's SDPA; vLLM's own TurboQuant kernels; fused-turboquant. An absent one is named with the reason.
Then storing keys and values (a decode append and a prefill), encode and decode, each with the searched codes of caches
and with the nearest codes. Medians of CUDA-graph replays, second-level cache flushed before each. What is known is
written after each row, so that a run that is cut keeps it; rivals other than FlashAttention-3 come last. ``--sweep``
tries launch parameters instead.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice, product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from report import table, write_json
from rivals import (
    VLLM_PRESETS,
    AbsentError,
    Step,
    flash_attention_2_step,
    flash_attention_3,
    flash_attention_3_step,
    fused_turboquant_step,
    sdpa_step,
    vllm_turboquant_step,
)
from timing import microseconds, read_bandwidth
from torch import Tensor

from turboquant_core import CacheCodec, Codec, KernelProvider, KernelRequest, PageLayout, VectorLayout, load_provider
from turboquant_core.scale import CACHE_RULE, ScaleRule

HERE = Path(__file__).parent
DEVICE = "cuda"
BITS = (4, 3, 2)
HEAD_DIMS = (64, 128, 256)
KV_HEADS = 8
SDPA_LARGEST_TOKENS = 1 << 18
# It writes scores and decoded values in single precision to memory.
FUSED_LARGEST_TOKENS = 1 << 17
SWEPT = ("4/128/4", "3/128/4", "2/128/4", "3/256/4", "4/64/4", "3/64/4", "2/64/4", "4/128/16", "store/4/128")
TITLES = {
    "fa3": "FA3 bf16",
    "fa2": "FA2 bf16",
    "sdpa": "SDPA bf16",
    **{preset: f"vLLM {preset}" for preset in VLLM_PRESETS},
    **{f"fused_turboquant_{bits}": f"fused-turboquant {bits} bit" for bits in BITS},
}
# 16-bit attention, timed beside ours; the packed rivals take tens of times longer and come last.
REFERENCES = ("fa3", "fa2", "sdpa")
APPEND_TOKENS = 32
PREFILL_TOKENS = 1 << 17
# What caches store, and the nearest codes with a scale of the same property: what the search costs.
SCALE_RULES: tuple[ScaleRule, ...] = (CACHE_RULE, "unbiased")


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
    pages = torch.randint(0, 256, layout.pages_shape(count), dtype=torch.uint8, device=DEVICE)
    scales = pages[..., layout.key_scale_offset :]
    values = 0.06 + 0.05 * torch.rand(*scales.shape[:2], scales.shape[2] // 2, device=DEVICE)
    pages[..., layout.key_scale_offset :] = values.half().view(torch.uint8)
    return pages, torch.randperm(count, device=DEVICE).int().view(shape.batch, -1).contiguous()


def packed_step(
    provider: KernelProvider, shape: Shape, bits: int, page_size: int, *, allocate: bool = False
) -> Callable[[], Tensor]:
    """One decode step of ours, all memory given, or its scratch allocated in each call."""
    layout = page_layout(shape, bits, page_size)
    codec = CacheCodec.create(layout, device=DEVICE)
    pages, block_table = random_pages(layout, shape)
    query = torch.randn(shape.batch, KV_HEADS * shape.group, shape.head_dim, device=DEVICE, dtype=torch.bfloat16)
    lengths = torch.full((shape.batch,), shape.tokens, dtype=torch.int32, device=DEVICE)
    request = KernelRequest(layout, query.device, query.dtype, shape.group)
    size = provider.workspace_bytes(request, shape.batch, shape.batch)
    workspace = None if allocate else torch.empty(size, dtype=torch.uint8, device=DEVICE)
    out = torch.empty_like(query)
    scaling = shape.head_dim**-0.5
    return lambda: (
        provider.attend(query, pages, block_table, lengths, codec, scaling=scaling, out=out, workspace=workspace).out
    )


def contenders(
    shape: Shape, library: Path | None, chosen: Collection[str] | None = None
) -> dict[str, Callable[[Tensor, Tensor, Tensor], Step]]:
    """What makes each rival (of those ``chosen``) ready for queries, keys and values; too large ones left out."""
    tokens = shape.batch * shape.tokens
    made: dict[str, Callable[[Tensor, Tensor, Tensor], Step]] = {
        "fa3": lambda q, k, v: flash_attention_3_step(flash_attention_3(library), q, k, v),
        "fa2": flash_attention_2_step,
    }
    if tokens <= SDPA_LARGEST_TOKENS:
        made["sdpa"] = sdpa_step
    for preset in VLLM_PRESETS:
        made[preset] = lambda q, k, v, preset=preset: vllm_turboquant_step(preset, q, shape.tokens, KV_HEADS)
    if tokens <= FUSED_LARGEST_TOKENS:
        for bits in BITS:
            made[f"fused_turboquant_{bits}"] = lambda q, k, v, bits=bits: fused_turboquant_step(bits, q, k, v)
    return {name: prepare for name, prepare in made.items() if chosen is None or name in chosen}


def rival_times(
    shape: Shape, library: Path | None, absent: dict[str, str], chosen: Collection[str]
) -> dict[str, float]:
    """Microseconds of each rival of those ``chosen`` that is here; why the others are not goes into ``absent``."""
    q = torch.randn(shape.batch, KV_HEADS * shape.group, shape.head_dim, device=DEVICE, dtype=torch.bfloat16)
    k = torch.randn(shape.batch, shape.tokens, KV_HEADS, shape.head_dim, device=DEVICE, dtype=torch.bfloat16)
    v = torch.randn_like(k)
    times: dict[str, float] = {}
    for name, prepare in contenders(shape, library, chosen).items():
        if name == "fa2" and "fa3" in times:
            absent.setdefault(name, "not timed: FlashAttention-3 is here")
            continue
        try:
            times[name] = microseconds(prepare(q, k, v))
        except AbsentError as error:
            absent[name] = str(error)
        torch.cuda.empty_cache()
    return times


def attention(
    provider: KernelProvider,
    shape: Shape,
    page_size: int,
    bandwidth: float,
    library: Path | None,
    absent: dict[str, str],
) -> dict[str, Any]:
    """Microseconds of ours and of 16-bit attention for one shape."""
    row: dict[str, Any] = {"shape": str(shape), **rival_times(shape, library, absent, REFERENCES)}
    for bits in BITS:
        layout = page_layout(shape, bits, page_size)
        row[f"limit_{bits}"] = shape.batch * shape.tokens * KV_HEADS * layout.token_bytes / bandwidth * 1e6
        row[f"packed_{bits}"] = microseconds(packed_step(provider, shape, bits, page_size))
        torch.cuda.empty_cache()
    return row


def vectors(
    provider: KernelProvider, head_dim: int, bits: int, scale_rule: ScaleRule, bandwidth: float
) -> dict[str, Any]:
    """Microseconds to encode and to decode the vectors of a prefill, beside the time to move their bytes."""
    codec = Codec.create(VectorLayout(head_dim, bits, "int8"), device=DEVICE, scale_rule=scale_rule)
    x = torch.randn(PREFILL_TOKENS, KV_HEADS, head_dim, device=DEVICE, dtype=torch.bfloat16)
    packed = provider.encode(x, codec)
    return {
        "head_dim": head_dim,
        "bits": bits,
        "scale_rule": scale_rule,
        "limit": (x.nbytes + packed.nbytes) / bandwidth * 1e6,
        "encode": microseconds(lambda: provider.encode(x, codec)),
        "decode": microseconds(lambda: provider.decode(packed, codec, torch.bfloat16)),
    }


def store_step(
    provider: KernelProvider, tokens: int, layout: PageLayout, scale_rule: ScaleRule = CACHE_RULE
) -> tuple[Callable[[], Tensor], int]:
    """Packing keys and values of ``tokens`` tokens, which gives the pages; and the bytes that it moves."""
    codec = CacheCodec.create(layout, device=DEVICE, key_scale=scale_rule, value_scale=scale_rule)
    pages = torch.zeros(layout.pages_shape(layout.pages_for(tokens)), dtype=torch.uint8, device=DEVICE)
    shape = (2, tokens, KV_HEADS, layout.key.head_dim)
    key, value = torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)
    slots = torch.arange(tokens, device=DEVICE)

    def step() -> Tensor:
        provider.store(key, value, pages, slots, codec)
        return pages

    return step, key.nbytes + value.nbytes + tokens * KV_HEADS * layout.token_bytes


def store(
    provider: KernelProvider, tokens: int, layout: PageLayout, scale_rule: ScaleRule, bandwidth: float
) -> dict[str, Any]:
    """Microseconds to pack keys and values of ``tokens`` tokens, beside the time to move their bytes."""
    step, moved = store_step(provider, tokens, layout, scale_rule)
    return {
        "tokens": tokens,
        "head_dim": layout.key.head_dim,
        "bits": layout.key.bits,
        "scale_rule": scale_rule,
        "limit": moved / bandwidth * 1e6,
        "store": microseconds(step),
    }


def attend_class(name: str) -> tuple[int, Shape]:
    """Bits and shape of a class ``bits/head_dim/group[/batch/context]``."""
    bits, head_dim, group, batch, context = (*(int(part) for part in name.split("/")), 8, 32768)[:5]
    return bits, Shape(batch, context, group, head_dim)


def class_step(provider: KernelProvider, name: str, page_size: int) -> Callable[[], Tensor]:
    """What a class runs: of :func:`attend_class`, or of ``store/bits/head_dim[/tokens]``."""
    if name.startswith("store/"):
        bits, head_dim, tokens = (*(int(part) for part in name.split("/")[1:]), PREFILL_TOKENS)[:3]
        layout = page_layout(Shape(1, tokens, head_dim=head_dim), bits, page_size)
        return store_step(provider, tokens, layout)[0]
    bits, shape = attend_class(name)
    return packed_step(provider, shape, bits, page_size, allocate=True)


def sweep_class(
    provider: KernelProvider, name: str, page_size: int, share: tuple[int, int] | None = None
) -> list[dict[str, Any]]:
    """Launch parameters of a class.

    With a ``share`` (number, of how many), only that one is run, once and without timing, so that it is compiled.
    """
    from sweep import sweep_attend, sweep_store

    from turboquant_triton.support import single_warps_supported

    step = class_step(provider, name, page_size)
    if name.startswith("store/"):
        return sweep_store(step, share)
    bits, shape = attend_class(name)
    single_warps = single_warps_supported(page_layout(shape, bits, page_size), max(8, shape.group))
    return sweep_attend(step, single_warps, share)


def compile_first(arguments: argparse.Namespace) -> None:
    """Fill Triton's cache with what is timed, in several processes: compilation takes far longer than timing."""
    command = [sys.executable, *sys.argv]
    shares = [[*command, "--share", str(share)] for share in range(arguments.processes)]
    running = [subprocess.Popen(share, stdout=subprocess.DEVNULL) for share in shares]
    for process in running:
        process.wait()


def sweep_all(provider: KernelProvider, arguments: argparse.Namespace) -> None:
    """Sweep the classes named on the command line, and write what is known after each."""
    results: dict[str, Any] = {}
    share = None if arguments.share is None else (arguments.share, arguments.processes)
    for name in arguments.sweep or SWEPT:
        results[name] = rows = sweep_class(provider, name, arguments.page_sizes[0], share)
        if share is not None:
            continue
        print(f"\n{name}\n\n{table(list(rows[0]), [list(row.values()) for row in rows[:12]])}", flush=True)
        write_json(arguments.json, results)


def attention_table(rows: list[dict[str, Any]]) -> str:
    """Times and, where FlashAttention-3 ran, how many times faster ours is."""
    known = {name for row in rows for name in row}
    names = [name for name in contenders(Shape(1, PREFILL_TOKENS), None) if name in known]
    lines = []
    for row in rows:
        line = [row["shape"], *(f"{row[name]:.1f}" if name in row else "-" for name in names)]
        for bits in BITS:
            ratio = f" ({row['fa3'] / row[f'packed_{bits}']:.2f}x)" if "fa3" in row else ""
            line.append(f"{row[f'packed_{bits}']:.1f} / {row[f'limit_{bits}']:.1f}{ratio}")
        lines.append(line)
    return table(
        ["shape", *(TITLES[name] for name in names), *(f"{bits} bit / limit (FA3 / ours)" for bits in BITS)], lines
    )


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


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fa3", type=Path, help="vLLM's _vllm_fa3_C shared library; an installed vLLM otherwise")
    parser.add_argument("--provider", default="triton")
    parser.add_argument("--page-sizes", type=int, nargs="+", default=[128, 64, 32, 16])
    parser.add_argument("--json", type=Path, help="where the results go; a file in benchmarks/results otherwise")
    parser.add_argument("--plot", type=Path, default=HERE.parent / "docs" / "images" / "kernels.png")
    parser.add_argument(
        "--report", action="store_true", help="only print the tables of the JSON file and draw its plot"
    )
    parser.add_argument("--processes", type=int, default=1, help="compile in so many beside one another, then time")
    parser.add_argument("--share", type=int, help=argparse.SUPPRESS)
    classes = "classes bits/head_dim/group[/batch/context] or store/bits/head_dim[/tokens]"
    help_text = f"try launch parameters of {classes}; {' '.join(SWEPT)}"
    parser.add_argument("--sweep", nargs="*", metavar="CLASS", help=help_text)
    parser.add_argument("--once", nargs="+", metavar="CLASS", help="only run classes once, for a profiler")
    arguments = parser.parse_args()
    name = "kernels.json" if arguments.sweep is None else "kernels_sweep.json"
    arguments.json = arguments.json or HERE / "results" / name
    return arguments


def vector_operations(
    provider: KernelProvider, page_size: int, bandwidth: float
) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """What gives the rows of storing, encoding and decoding."""
    for tokens, head_dim, bits, rule in product((APPEND_TOKENS, PREFILL_TOKENS), HEAD_DIMS, BITS, SCALE_RULES):
        layout = page_layout(Shape(1, tokens, head_dim=head_dim), bits, page_size)
        yield "store", partial(store, provider, tokens, layout, rule, bandwidth)
    for head_dim, bits, rule in product(HEAD_DIMS, BITS, SCALE_RULES):
        yield "vectors", partial(vectors, provider, head_dim, bits, rule, bandwidth)


def shapes(page_sizes: list[int]) -> Iterator[tuple[int, Shape]]:
    """Page size and shape of each row of attention: all shapes with the first page size, some with the others."""
    for page_size in page_sizes:
        for shape in SHAPES if page_size == page_sizes[0] else SHAPES[:6]:
            yield page_size, shape


def run_once(provider: KernelProvider, page_sizes: list[int]) -> Iterator[Callable[[], Any]]:
    """Every call of ours that is timed, without its timing."""
    for (page_size, shape), bits in product(shapes(page_sizes), BITS):
        yield lambda shape=shape, bits=bits, page_size=page_size: packed_step(provider, shape, bits, page_size)()
    for _, row in vector_operations(provider, page_sizes[0], 1.0):
        yield row


def compile_share(provider: KernelProvider, arguments: argparse.Namespace) -> None:
    """Run what falls to ``--share`` of ``--processes``, so that it is compiled."""
    calls = run_once(provider, arguments.page_sizes)
    with mock.patch(f"{__name__}.microseconds", lambda work: work()):
        for call in islice(calls, arguments.share, None, arguments.processes):
            call()
            torch.cuda.empty_cache()


def measure(provider: KernelProvider, arguments: argparse.Namespace) -> None:
    """Every table, written to the file row by row."""
    bandwidth = read_bandwidth()
    print(f"{torch.cuda.get_device_name()}, read bandwidth {bandwidth / 1e12:.2f} TB/s, microseconds", flush=True)
    absent: dict[str, str] = {}
    results: dict[str, Any] = {"bandwidth": bandwidth, "absent": absent, "store": [], "vectors": []}
    first = arguments.page_sizes[0]
    for page_size, shape in shapes(arguments.page_sizes):
        rows = results.setdefault(f"attention_page_{page_size}", [])
        rows.append(attention(provider, shape, page_size, bandwidth, arguments.fa3, absent))
        write_json(arguments.json, results)
    for name, row in vector_operations(provider, first, bandwidth):
        results[name].append(row())
        write_json(arguments.json, results)
    packed = [name for name in contenders(SHAPES[0], None) if name not in REFERENCES]
    for row, shape in zip(results[f"attention_page_{first}"], SHAPES, strict=True):
        row.update(rival_times(shape, arguments.fa3, absent, packed))
        write_json(arguments.json, results)


def rows_table(rows: list[dict[str, Any]]) -> str:
    """A column for every name that a row has; ``-`` where a row, of an older command, lacks it."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return table(names, [[row.get(name, "-") for name in names] for row in rows])


def show(results: dict[str, Any]) -> None:
    """Print the tables."""
    for name, rows in results.items():
        if name.startswith("attention"):
            print(f"\n{name.replace('attention_page_', 'pages of ')} tokens\n\n{attention_table(rows)}")
        elif name in ("store", "vectors") and rows:
            print(f"\n{name}\n\n{rows_table(rows)}")
    for name, reason in results.get("absent", {}).items():
        print(f"absent: {name}: {reason}")


def report(arguments: argparse.Namespace) -> None:
    """Print the tables of a JSON file, and draw its plot where FlashAttention-3 ran; needs no GPU."""
    results = json.loads(arguments.json.read_text(encoding="utf-8"))["results"]
    show(results)
    rows = results.get(f"attention_page_{arguments.page_sizes[0]}", [])
    if rows and all("fa3" in row for row in rows):
        plot(rows, arguments.plot)


def main() -> None:
    arguments = parsed()
    if arguments.report:
        report(arguments)
        return
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device: these figures are of a GPU")
    provider = load_provider(arguments.provider)
    if arguments.once:
        for name in arguments.once:
            class_step(provider, name, arguments.page_sizes[0])()
        return
    if arguments.processes > 1 and arguments.share is None:
        compile_first(arguments)
    if arguments.sweep is not None:
        sweep_all(provider, arguments)
    elif arguments.share is not None:
        compile_share(provider, arguments)
    else:
        measure(provider, arguments)
        report(arguments)


if __name__ == "__main__":
    main()
