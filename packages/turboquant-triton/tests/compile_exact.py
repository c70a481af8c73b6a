"""Compile the kernels of exact tokens ahead of time: ``compile_exact.py CAPABILITY HEAD_DIM``, JSON lines out."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

from compile_kernels import compiled_for, resources

from turboquant_triton.kernels.add_tokens import add_tokens_kernel
from turboquant_triton.kernels.attend_exact import attend_exact_kernel
from turboquant_triton.kernels.store_exact import store_exact_kernel
from turboquant_triton.launch import LARGE, SMALL

RUNS = ("first_keys", "first_values", "last_keys", "last_values")
FLOATS = ("key", "value", "query", "key_rows", "value_rows", "out", "sinks", *RUNS)
OTHERS = {
    "slot_mapping": "*i64", "block_table": "*i32", "seq_lens": "*i32", "query_start_loc": "*i32", "center": "*fp32",
    "lse": "*fp32", "visible": "*u8", "scaling_log2": "fp32", "softcap_log2": "fp32",
}  # fmt: skip


def signature(kernel: Any, constants: dict[str, Any], dtype: str) -> dict[str, str]:
    """Triton's type of every argument."""
    types = {**dict.fromkeys(FLOATS, f"*{dtype}"), **OTHERS}
    strides = {name: "i64" for name in kernel.arg_names if name.endswith("_stride")}
    return {n: "constexpr" if n in constants else {**types, **strides}.get(n, "i32") for n in kernel.arg_names}


def launches(dim: int) -> Iterator[tuple[str, Any, dict[str, Any], dict[str, int]]]:
    """Name, kernel, compile-time arguments and options."""
    pages = {"D": dim, "VALUE_DIM": dim, "PAGE_SIZE": 512, "FIRST": 4, "KV_HEADS": 8}
    for name, launch in (("few", SMALL), ("many", LARGE)):
        store = {**pages, "RING": 24, "BLOCK": launch.block}
        yield f"store {name} rows", store_exact_kernel, store, {"num_warps": launch.num_warps}
    plain = {"RAGGED": False, "HAS_CENTER": False, "HAS_SOFTCAP": False}
    for name, q_len, options in (
        ("decode", 1, plain),
        ("verify", 4, {**plain, "HAS_SOFTCAP": True}),
        ("ragged", 1, {**plain, "RAGGED": True, "HAS_CENTER": True}),
    ):
        rows = {"RING": 28, "RECENT": 24, "GROUP": 8, "Q_LEN": q_len, "CHUNKS": 1, "N": max(8 * q_len, 16), "BLOCK": 32}
        attend = {**pages, **rows, **options}
        yield f"attend {name}", attend_exact_kernel, attend, {"num_warps": 4, "num_stages": 1}
    heads = {"D": dim, "VALUE_DIM": dim, "KV_HEADS": 8, "GROUP": 4, "CHUNKS": 1, "N": 16, "BLOCK": 16}
    plain = {"WIDE": False, "HAS_CENTER": False, "HAS_SOFTCAP": False, "HAS_SINKS": False, "HAS_VISIBLE": False}
    for name, options in (("plain", {}), ("hidden", {"HAS_VISIBLE": True}), ("all", {**dict.fromkeys(plain, True)})):
        yield f"add {name}", add_tokens_kernel, {**heads, **plain, **options}, {"num_warps": 4, "num_stages": 1}


if __name__ == "__main__":
    capability, head_dim = (int(argument) for argument in sys.argv[1:])
    for dtype in ("bf16", "fp16", "fp32"):
        for name, kernel, constants, options in launches(head_dim):
            types = signature(kernel, constants, dtype)
            binary = compiled_for(kernel, types, constants, capability, **options)
            print(json.dumps({"name": f"{name} {dtype}", **resources(binary)}), flush=True)
