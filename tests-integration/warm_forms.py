"""Compare what a serving engine compiles at its start with what its steps ask for: one JSON list out, empty when equal.

No GPU is needed: Triton is asked for every compilation and makes none. A program of its own because Triton decides at
import whether it interprets or compiles.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "packages/turboquant-triton/tests"))

from specializations import requested

from turboquant_core import CacheCodec
from turboquant_core.testing.cases import page_layout
from turboquant_triton import device
from turboquant_triton.attend import AttendOptions, attend
from turboquant_vllm.batch_sizes import sizes

MULTIPROCESSORS = (78, 108, 132)
# (KV heads, group): shares of models by tensor parallelism among them.
HEADS = ((1, 1), (1, 5), (2, 2), (3, 1), (3, 3), (8, 1), (8, 4))
MOST_ROWS = 300


def steps(batches: Iterable[int], kv_heads: int, group: int) -> None:
    """Decode steps of ``batches``."""
    codec = CacheCodec.create(page_layout(4, 4, 64, kv_heads=kv_heads))
    pages = torch.zeros(codec.layout.pages_shape(1), dtype=torch.uint8)
    call: dict[str, Any] = dict.fromkeys(("query_start_loc", "seq_starts", "sinks", "out", "workspace"))
    for batch in batches:
        query = torch.zeros((batch, kv_heads * group, 64), dtype=torch.bfloat16)
        table, lengths = torch.zeros((batch, 1), dtype=torch.int32), torch.ones(batch, dtype=torch.int32)
        attend(query, pages, table, lengths, codec, AttendOptions(0.1, None, None), **call, permute=True)


def main() -> None:
    asked = requested()
    cold = []
    for count in MULTIPROCESSORS:
        device._INTERPRETED_MULTIPROCESSORS = count
        device.multiprocessors.cache_clear()
        for kv_heads, group in HEADS:
            asked.clear()
            steps(sizes(MOST_ROWS), kv_heads, group)
            warm = {name: set(keys) for name, keys in asked.items()}
            steps(range(1, MOST_ROWS + 1), kv_heads, group)
            cold += [[count, kv_heads, group, name] for name, keys in asked.items() if keys - warm[name]]
    print(json.dumps(cold))


if __name__ == "__main__":
    main()
