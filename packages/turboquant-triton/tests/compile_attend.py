"""Compile both forms of attention ahead of time: ``compile_attend.py CAPABILITY HEAD_DIM``, JSON lines out."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from typing import Any

import triton.language as tl
from compile_kernels import compiled_for, resources

from turboquant_core.testing.cases import page_layout
from turboquant_triton.kernels.attend_merge import attend_merge_kernel
from turboquant_triton.kernels.attend_permute import attend_permute_kernel
from turboquant_triton.kernels.attend_portable import attend_portable_kernel
from turboquant_triton.kernels.attend_prepare import attend_prepare_kernel
from turboquant_triton.kernels.attend_warp import attend_warp_kernel
from turboquant_triton.support import single_warps_supported
from turboquant_triton.tuning import PORTABLE, AttendConfig, attend_config, warp_config

TYPES = {
    "query": "*i8", "pages": "*i8", "quantized": "*i8", "block_table": "*i32", "seq_lens": "*i32", "plan": "*i32",
    "seq_starts": "*i32", "query_start_loc": "*i32", "hadamard": "*fp16", "out": "*bf16", "page_stride": "i64",
    "softcap_log2": "fp32", "multiplier": "fp32", "output_scale": "fp32",
}  # fmt: skip
FLOATS = ("query_stats", "stats", "partial", "signs", "sinks", "lse", "key_levels", "value_levels")
GROUPED = {"KV_HEADS": 8, "CHUNKS": 1, "GROUP": 4, "Q_LEN": 1}
SEEN = {"HAS_WINDOW": False, "HAS_STARTS": False, "ROWS_BLOCK": 32}


def signature(kernel: Any, constants: dict[str, Any], **types: str) -> dict[str, str]:
    """Triton's type of every argument."""
    known = {**dict.fromkeys(FLOATS, "*fp32"), **TYPES, **types}
    return {name: "constexpr" if name in constants else known.get(name, "i32") for name in kernel.arg_names}


def attention(key_bits: int, value_bits: int, dim: int, config: AttendConfig) -> dict[str, Any]:
    """Compile-time arguments of both forms."""
    return {
        "D": dim, "VALUE_DIM": dim, "KEY_BITS": key_bits, "VALUE_BITS": value_bits, "RAW_TYPE": tl.bfloat16,
        "PAGE_SIZE": 128, "EXACT_BYTES": 0, **GROUPED, "N": 8, "BLOCK": config.block, "HAS_WINDOW": False,
        "HAS_SOFTCAP": False, "ROWS_BLOCK": 32,
    }  # fmt: skip


def single_warps(
    dim: int, key_bits: int, value_bits: int, newest: bool, **other: Any
) -> tuple[str, Any, dict[str, Any], dict[str, str], dict[str, int]]:
    """The kernel of single warps, with ``other`` compile-time arguments than those of a plain decode step."""
    config = warp_config(key_bits, value_bits, dim, other.get("N", 8), other.get("PAGE_SIZE", 128))
    constants = {
        "D": dim, "VALUE_DIM": dim, "KEY_BITS": key_bits, "VALUE_BITS": value_bits, "PAGE_SIZE": 128, **GROUPED, **SEEN,
        "CHUNK_BYTES": 128 * (dim * (key_bits + value_bits) // 8 + 4), "N": 8, "BLOCK": config.block,
        "HAS_SOFTCAP": False, "PDL": newest, **other,
    }  # fmt: skip
    options = {"num_warps": 1}
    if config.max_registers is not None:
        options["maxnreg"] = config.max_registers
    return f"warp {key_bits}/{value_bits}", attend_warp_kernel, constants, {}, options


def register_orders(ttgir: str) -> list[str]:
    """Type and ``kWidth`` of every matrix operand that is unpacked in registers."""
    operand = r"tensor<[0-9x]+x(i8|i16), #ttg\.dot_op<\{opIdx = 0, parent = #\w+, kWidth = (\d+)\}>>"
    return sorted({f"{kind}/{width}" for kind, width in re.findall(operand, ttgir)})


def launches(dim: int, newest: bool) -> Iterator[tuple[str, Any, dict[str, Any], dict[str, str], dict[str, int]]]:
    """Name, kernel, compile-time arguments, types and options of every kernel of attention."""
    pairs = [(4, 4), (3, 3), (2, 2), (4, 16)]
    # Codes of two widths (2.5 and 3.5 bits) need halves of whole words.
    pairs += [(302, 302), (403, 403)] if dim % 32 == 0 else []
    for key_bits, value_bits in pairs:
        config = attend_config(key_bits, value_bits, dim)
        constants = attention(key_bits, value_bits, dim, config)
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        permute = {**constants, "HAS_STARTS": False, "TABLE": 128 if config.num_warps == 1 else 32, "PDL": newest}
        yield f"permute {key_bits}/{value_bits}", attend_permute_kernel, permute, {}, options
        if key_bits == value_bits < 10 and single_warps_supported(page_layout(key_bits, value_bits, dim), 8):
            yield single_warps(dim, key_bits, value_bits, newest)
        raw = {"KEY_INT8": True, "VALUE_INT8": False, "RAW_BITS": 16 if value_bits == 16 else 0}
        portable = {**attention(key_bits, value_bits, dim, PORTABLE), **raw, "N": 16}
        types = {"query": "*fp32", "pages": "*u8"}
        options = {"num_warps": PORTABLE.num_warps, "num_stages": PORTABLE.num_stages}
        yield f"portable {key_bits}/{value_bits}", attend_portable_kernel, portable, types, options
    if dim == 128:
        every = {"PAGE_SIZE": 16, "Q_LEN": 2, "HAS_STARTS": True, "HAS_WINDOW": True, "HAS_SOFTCAP": True}
        for other in ({"N": 16}, every):
            name, *rest = single_warps(dim, 4, 2, newest, **other)
            yield f"{name} {other}", *rest
    prepare = {
        "D": dim,
        **GROUPED,
        "N": 8,
        "BLOCK": 64,
        "QUANTIZE": True,
        "RAGGED": False,
        "KEY_BITS": 4,
        "SKIP_FIRST": 0,
        "SKIP_LAST": 0,
        **SEEN,
        "PDL": newest,
    }
    types = {"query": "*bf16"}
    merge = {"D": dim, **GROUPED, "N": 8, "ROTATED": True, "HAS_SINKS": False, "PDL": newest}
    for together in (1, 16) if dim <= 128 else (1,):
        several = {"VECTORS": together}
        tile = several | {"PIECES": 16 if together == 1 else 4}
        yield f"prepare {together}", attend_prepare_kernel, prepare | several, types, {"num_warps": 8}
        yield f"merge {together}", attend_merge_kernel, merge | tile, {}, {"num_warps": 8}


if __name__ == "__main__":
    capability, head_dim = (int(argument) for argument in sys.argv[1:])
    for name, kernel, constants, types, options in launches(head_dim, capability >= 90):
        binary = compiled_for(kernel, signature(kernel, constants, **types), constants, capability, **options)
        ttgir = binary.asm["ttgir"]
        copies = ttgir.count("ttg.async_copy_global_to_local")
        orders = register_orders(ttgir) if name.startswith("permute") else []
        record = {"name": name, "copies": copies, "stages": options.get("num_stages", 1), "orders": orders}
        print(json.dumps({**record, **resources(binary)}), flush=True)
