"""Time GPU work: medians of CUDA-graph replays, second-level cache flushed before each."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

FLUSH_BYTES = 256 << 20
REPLAYS = 9


@cache
def _flush_buffer() -> torch.Tensor:
    return torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")


def capture(work: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """A graph of one call of ``work``, after a warm-up that compiles and allocates."""
    work()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def microseconds(work: Callable[[], Any], replays: int = REPLAYS) -> float:
    """Median time of ``work``."""
    graph = capture(work)
    times = []
    for _ in range(replays):
        _flush_buffer().zero_()
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) * 1e3)
    return sorted(times)[replays // 2]


def read_bandwidth() -> float:
    """Bytes per second that a reduction reads from a buffer much larger than any cache."""
    buffer = torch.randn(1 << 30, device="cuda")
    return buffer.nbytes / (microseconds(lambda: torch.sum(buffer)) * 1e-6)
