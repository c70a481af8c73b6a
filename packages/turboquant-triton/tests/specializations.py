"""Count what a serving process would compile, without a GPU: ``specializations.py``, one JSON object out.

Calls every launcher as a server does, with batches that grow and shrink and sequences of any length, and prints for
each kernel how many compilations Triton asked for. A program of its own because Triton decides at import whether it
interprets or compiles.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from turboquant_core import CacheCodec
from turboquant_core.testing.cases import page_layout
from turboquant_triton import device
from turboquant_triton.attend import AttendOptions, attend
from turboquant_triton.kernels.decode import decode
from turboquant_triton.kernels.encode import encode
from turboquant_triton.kernels.gather import gather
from turboquant_triton.kernels.store import store

BATCHES = (1, 2, 3, 5, 8, 15, 16, 17, 31, 32, 300)
TOKENS = (1, 2, 3, 16, 17, 48, 100)
GROUP = 4
HEAD_DIM = 64


class Driver:
    """An H200 as far as Triton asks before it compiles."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def requested() -> dict[str, set[str]]:
    """Compilations of each kernel that are asked for from now on; none is made, and nothing is launched."""
    asked: dict[str, set[str]] = defaultdict(set)

    def refuse(*, key: Any, fn: Any, **_: Any) -> bool:
        asked[fn.name].add(str(key))
        return True

    triton.runtime.driver.set_active(Driver())
    triton.knobs.runtime.jit_cache_hook = refuse
    return asked


def tables(batch: int, pages: int) -> Iterator[Tensor]:
    """Block tables of a batch whose row strides have no common divisor."""
    for width in (1, 16, 17):
        yield torch.zeros((batch, width), dtype=torch.int32) + pages - 1


def attend_steps(codec: CacheCodec, pages: Tensor, permute: bool) -> None:
    options = AttendOptions(0.1, None, None)
    call: dict[str, Any] = {"seq_starts": None, "sinks": None, "out": None, "workspace": None, "permute": permute}
    for batch in BATCHES:
        query = torch.zeros((batch, GROUP * codec.layout.kv_heads, HEAD_DIM), dtype=torch.bfloat16)
        lengths = torch.ones(batch, dtype=torch.int32)
        for table in tables(batch, pages.shape[0]):
            attend(query, pages, table, lengths, codec, options, query_start_loc=None, **call)
        starts = torch.zeros(len(lengths) + 1, dtype=torch.int32)
        attend(query, pages, table, lengths, codec, options, query_start_loc=starts, **call)


def vector_steps(codec: CacheCodec, pages: Tensor) -> None:
    for tokens in TOKENS:
        x = torch.zeros((tokens, codec.layout.kv_heads, HEAD_DIM), dtype=torch.bfloat16)
        store(x, x, pages, torch.full((tokens,), -1), codec)
        encode(x, codec.key)
        codes = torch.zeros((tokens, codec.layout.key.code_bytes), dtype=torch.uint8)
        decode(type(encode(x, codec.key))(codes, torch.zeros(tokens, dtype=torch.float16)), codec.key)
        for table in tables(1, pages.shape[0]):
            stop = min(tokens, table.shape[1] * codec.layout.page_size)
            for start in (0, 1):
                if start < stop:
                    gather(pages, table, codec, start=start, stop=stop, dtype=torch.bfloat16)


def main() -> None:
    device._INTERPRETED_MULTIPROCESSORS = 132
    layout = page_layout(4, 4, HEAD_DIM, kv_heads=2)
    codec = CacheCodec.create(layout)
    pages = torch.zeros(layout.pages_shape(3), dtype=torch.uint8)
    asked = requested()
    for permute in (True, False):
        attend_steps(codec, pages, permute)
    vector_steps(codec, pages)
    print(json.dumps({name: len(keys) for name, keys in sorted(asked.items())}))


if __name__ == "__main__":
    main()
