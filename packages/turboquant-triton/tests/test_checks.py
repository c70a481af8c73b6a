"""What the launchers refuse before a kernel runs: one error that names the argument and what it must be."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from turboquant_core import CacheCodec, ReferenceProvider
from turboquant_core.testing.cases import page_layout
from turboquant_triton.attend import AttendOptions, attend
from turboquant_triton.checks import check_attend
from turboquant_triton.input_checks import check_gather, check_store

LAYOUT = page_layout(4, 4, 64)


def arguments(**changes: Any) -> dict[str, Any]:
    return {
        "query": torch.zeros(2, 4, 64),
        "pages": torch.zeros(LAYOUT.pages_shape(3), dtype=torch.uint8),
        "block_table": torch.zeros(2, 2, dtype=torch.int32),
        "seq_lens": torch.ones(2, dtype=torch.int32),
        "query_start_loc": None,
        "seq_starts": None,
        "window": None,
        "softcap": None,
        "sinks": None,
        "out": None,
        **changes,
    }


def test_what_fits_is_taken() -> None:
    check_attend(**arguments(), layout=LAYOUT)
    check_attend(
        **arguments(
            query_start_loc=torch.tensor([0, 1, 2]),
            seq_starts=torch.zeros(2, dtype=torch.int32),
            window=1,
            softcap=1.0,
            sinks=torch.zeros(4),
            out=torch.zeros(2, 4, 64),
        ),
        layout=LAYOUT,
    )


# Refused by the reference too, in the same words.
SHARED = [
    ({"query": torch.zeros(2, 0, 64)}, r"query has shape \(2, 0, 64\); .* q_heads \(a multiple of 2\)"),
    ({"query": torch.zeros(2, 3, 64)}, "a multiple of 2"),
    ({"query": torch.zeros(3, 4, 64)}, "3 query tokens do not divide by the batch of 2"),
    ({"seq_lens": torch.ones(2)}, r"seq_lens is torch\.float32; it must hold integers"),
    ({"seq_lens": torch.ones(2, dtype=torch.bool)}, r"seq_lens is torch\.bool; it must hold integers"),
    ({"seq_lens": torch.ones(0, dtype=torch.int32)}, "batch at least 1"),
    ({"block_table": torch.zeros(2, 2)}, r"block_table is torch\.float32; it must hold integers"),
    ({"block_table": torch.zeros(3, 2, dtype=torch.int32)}, r"block_table has shape \(3, 2\); it must be \[batch = 2"),
    ({"query_start_loc": torch.tensor([0.0, 1.0, 2.0])}, r"query_start_loc is torch\.float32; it must hold integers"),
    ({"query_start_loc": torch.tensor([0, 2])}, r"query_start_loc has shape \(2,\); it must be \[batch \+ 1 = 3\]"),
    ({"seq_starts": torch.zeros(2)}, r"seq_starts is torch\.float32; it must hold integers"),
    ({"seq_starts": torch.zeros(1, dtype=torch.int32)}, r"seq_starts has shape \(1,\); it must be \[batch = 2\]"),
    ({"window": 0}, "window is 0; it must be at least 1 or None"),
    ({"softcap": 0.0}, r"softcap is 0\.0; it must be positive or None"),
    ({"sinks": torch.zeros(3)}, r"sinks are torch\.float32 of shape \(3,\); they must be float \[q_heads = 4\]"),
    ({"sinks": torch.zeros(4, dtype=torch.int32)}, r"sinks are torch\.int32 .* they must be float"),
    ({"sinks": [0.0] * 4}, r"sinks is a list; it must be a torch\.Tensor"),
    ({"out": torch.zeros(2, 4, 32)}, r"out is torch\.float32 \(2, 4, 32\)"),
    ({"out": torch.zeros(2, 4, 64, dtype=torch.float16)}, r"out is torch\.float16"),
    ({"query": torch.zeros(2, 4, 64, device="meta")}, "query is on meta"),
    ({"seq_starts": torch.zeros(2, device="meta")}, "seq_starts is on meta"),
    ({"query_start_loc": torch.zeros(3, device="meta")}, "query_start_loc is on meta"),
    ({"block_table": torch.zeros(2, 2, device="meta")}, "block_table is on meta"),
    ({"sinks": torch.zeros(4, device="meta")}, "sinks is on meta"),
    ({"out": torch.zeros(2, 4, 64, device="meta")}, "out is on meta"),
    ({"pages": torch.zeros(LAYOUT.pages_shape(3))}, "pages are"),
]


@pytest.mark.parametrize(("changes", "message"), SHARED)
def test_attend(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_attend(**arguments(**changes), layout=LAYOUT)
    with pytest.raises(ValueError, match=message):
        ReferenceProvider().attend(**arguments(**changes), codec=CacheCodec.create(LAYOUT), scaling=1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": torch.zeros(2, 4, 64, dtype=torch.int32)}, r"query is torch\.int32; the kernels take float16"),
        ({"query": torch.zeros(2, 4, 64, dtype=torch.float64)}, r"query is torch\.float64; the kernels take float16"),
        ({"seq_lens": torch.ones(2, dtype=torch.int64)}, r"seq_lens is torch\.int64; the kernels take torch\.int32"),
        ({"block_table": torch.zeros(2, 2, dtype=torch.int64)}, r"block_table is torch\.int64; the kernels take"),
        ({"out": torch.zeros(2, 64, 4).transpose(1, 2)}, "the kernels write contiguous memory"),
    ],
)
def test_what_only_the_kernels_refuse(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_attend(**arguments(**changes), layout=LAYOUT)


def test_the_launcher_asks_first() -> None:
    codec, given = CacheCodec.create(LAYOUT), arguments(query=torch.zeros(2, 0, 64))
    options = AttendOptions(scaling=1.0, window=None, softcap=None)
    for name in ("window", "softcap"):
        del given[name]
    with pytest.raises(ValueError, match="query has shape"):
        attend(**given, codec=codec, options=options, workspace=None, permute=False)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_slots_and_tables_hold_integers(dtype: torch.dtype) -> None:
    codec, pages = CacheCodec.create(LAYOUT), arguments()["pages"]
    key = torch.zeros(1, 2, 64)
    with pytest.raises(ValueError, match=f"slot_mapping is {dtype}; it must hold integers"):
        check_store(key, key, pages, torch.zeros(1, dtype=dtype), codec)
    with pytest.raises(ValueError, match=f"block_table is {dtype}; it must hold integers"):
        check_gather(pages, torch.zeros(1, 1, dtype=dtype), codec, 0, 1, torch.float32)
