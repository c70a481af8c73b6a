"""Compile the vector kernels ahead of time, no GPU needed: ``compile_kernels.py CAPABILITY HEAD_DIM``, JSON lines out.

A program of its own because Triton decides at import whether it interprets or compiles.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from gpu_memory import SHARED_MEMORY
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from turboquant_core import VectorLayout
from turboquant_core.scale import CACHE_RULE
from turboquant_core.testing.cases import page_layout
from turboquant_triton.kernels.decode import decode_kernel
from turboquant_triton.kernels.encode import encode_kernel
from turboquant_triton.kernels.gather import gather_kernel, gather_raw_kernel
from turboquant_triton.kernels.scores import rotate_kernel, scores_kernel
from turboquant_triton.kernels.store import store_kernel
from turboquant_triton.launch import (
    LARGE,
    SMALL,
    RowsConfig,
    bits_code,
    decode_block,
    decode_columns,
    fitted,
    part_columns,
    scores_config,
)

POINTERS = {
    "codes": "units", "units": "units", "key_units": "units", "value_units": "value_units", "out": "*fp32",
    "scales": "*fp16", "matrix": "*fp16", "key_matrix": "*fp16", "value_matrix": "*fp16", "slot_mapping": "*i64",
    "block_table": "*i32", "x": "*bf16", "key": "*bf16", "value": "*bf16", "query": "*bf16", "pages": "*bf16",
}  # fmt: skip
FLOATS = ("center", "signs", "levels", "boundaries")
STRIDES = "_stride"


def argument_type(name: str, bits: int, value_bits: int) -> str:
    """Triton's type of a kernel argument, by the name it has in every kernel."""
    if name.endswith(FLOATS):
        return "*fp32"
    kind = POINTERS.get(name, "i64" if name.endswith(STRIDES) else "fp32" if name == "scaling" else "i32")
    width = {"units": bits, "value_units": value_bits}.get(kind, 0)
    return ("*i32" if width in (2, 4) else "*i16") if width else kind


def compiled(kernel: Any, constants: dict[str, Any], capability: int, **options: int) -> Any:
    """Compile for ``sm_<capability>``; pointers and strides are multiples of 16, as the launchers find them."""
    names = kernel.arg_names
    bits, value_bits = constants.get("BITS", 4), constants.get("VALUE_BITS", 4)
    signature = {n: "constexpr" if n in constants else argument_type(n, bits, value_bits) for n in names}
    return compiled_for(kernel, signature, constants, capability, **options)


def compiled_for(
    kernel: Any, signature: dict[str, str], constants: dict[str, Any], capability: int, **options: int
) -> Any:
    """Compile with the given argument types."""
    names = kernel.arg_names
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(names)
        if signature[n].startswith("*") or n.endswith(STRIDES)
    }
    values = {(names.index(name),): value for name, value in constants.items()}
    kind = GluonASTSource if kernel.is_gluon() else ASTSource
    source = kind(fn=kernel, signature=signature, constexprs=values, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(kernel: Any) -> dict[str, int]:
    """Registers, bytes of stack (spills) and shared memory of a compiled kernel."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    used = dict(part.split(":") for part in (text.stdout + text.stderr).split() if part.startswith(("REG:", "STACK:")))
    return {"registers": int(used["REG"]), "stack": int(used["STACK"]), "shared": int(kernel.metadata.shared)}


def kernels(head_dim: int, shared: int) -> Iterator[tuple[str, Any, dict[str, Any], dict[str, int]]]:
    """Name, kernel, compile-time arguments and options of every class of launch; ``shared`` as a program can have."""
    four = VectorLayout(head_dim, 4, "int8")
    for name, launch in (("few", SMALL), ("many", LARGE)):
        block = {"BLOCK": launch.block}
        for layout in vector_layouts(head_dim):
            bits, form = layout.bits, layout.form
            options, part = launched(launch, layout, shared)
            shape = {"D": head_dim, "BITS": bits_code(layout), "INT8": form == "int8", **block}
            label = f"{bits}-bit {form}, {name} rows"
            yield f"encode {label}", encode_kernel, encode_constants({**shape, **part}), options
            decoded = {**shape, **decode_constants(launch, head_dim, False)}
            yield f"decode {label}", decode_kernel, decoded, {"num_warps": 4}
            for rotated in (False, True):
                gathered = {**shape, **decode_constants(launch, head_dim, rotated)}
                pages = {**gathered, "ROTATED": rotated, **page_constants(head_dim, bits)}
                yield f"gather {label}, rotated={rotated}", gather_kernel, pages, {"num_warps": 4}
        options, part = launched(launch, four, shared)
        yield f"store {name} rows", store_kernel, store_constants(head_dim, launch, part), options
        raw = {"D": head_dim, "OFFSET": 1024, "CHUNK": 4096, "KV_HEADS": 8, "PAGE_SIZE": 16, **block}
        yield f"gather raw {name} rows", gather_raw_kernel, raw, {"num_warps": 4}
        yield f"rotate {name} rows", rotate_kernel, {"D": head_dim, "SPLIT": True, **part, **block}, options
    config = scores_config(4096, head_dim)
    shape = {"D": head_dim, "BITS": 4, "INT8": True, "BLOCK": config.block}
    yield "scores", scores_kernel, {**shape, "KEYS": config.keys, "TILES": config.tiles}, {"num_stages": 1}


def launched(launch: RowsConfig, layout: VectorLayout, shared: int) -> tuple[dict[str, int], dict[str, int]]:
    """Options of a launch, and the positions that it rotates at a time."""
    config = fitted(launch, shared, layout)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return options, {"COLUMNS": part_columns(layout, config)}


def decode_constants(launch: RowsConfig, head_dim: int, rotated: bool) -> dict[str, Any]:
    """Compile-time arguments of decode and gather for as many rows as ``launch`` is for."""
    with mock.patch("turboquant_triton.launch.multiprocessors", return_value=1):
        block = decode_block(launch.block, head_dim, torch.device("cuda"), rotated)
    return {"WIDTH": decode_columns(head_dim, block), "BLOCK": block, "HAS_CENTER": True}


def vector_layouts(head_dim: int) -> list[VectorLayout]:
    """Every width and form, and two widths where the kernels take them."""
    wanted: list[tuple[float, Any]] = [(4, "int8"), (4, "cubic"), (3, "int8"), (2, "cubic")]
    if head_dim % 32 == 0:
        wanted += [(2.5, "int8"), (3.5, "int8"), (3.5, "cubic")]
    return [VectorLayout(head_dim, bits, form) for bits, form in wanted]


def encode_constants(shape: dict[str, Any]) -> dict[str, Any]:
    """Compile-time arguments of encode for 16-bit input, codes and scale as caches take them."""
    return {**shape, "RULE": CACHE_RULE, "HAS_CENTER": False, "SPLIT": False}


def page_constants(head_dim: int, bits: float) -> dict[str, int]:
    """Where gather finds a code row and its scale."""
    layout = page_layout(bits, bits, head_dim, kv_heads=8)
    offsets = {"CODE_OFFSET": layout.value_offset, "SCALE_OFFSET": layout.value_scale_offset}
    return {**offsets, "CHUNK_BYTES": layout.chunk_bytes, "KV_HEADS": 8, "PAGE_SIZE": 16}


def store_constants(head_dim: int, launch: RowsConfig, part: dict[str, int]) -> dict[str, Any]:
    """Compile-time arguments of store for 4-bit keys and values in their default forms."""
    layout = page_layout(4, 4, head_dim, kv_heads=8)
    key = encode_constants({"D": head_dim, "BITS": 4, "INT8": True, **part})
    value = {"VALUE_DIM": head_dim, "VALUE_BITS": 4, "VALUE_INT8": False, "VALUE_RULE": CACHE_RULE}
    value |= {
        "VALUE_SPLIT": False,
        "VALUE_COLUMNS": part["COLUMNS"],
        "RAW": False,
        "VALUE_OFFSET": layout.value_offset,
    }
    scales = {"KEY_SCALE_OFFSET": layout.key_scale_offset, "VALUE_SCALE_OFFSET": layout.value_scale_offset}
    pages = {"CHUNK_BYTES": layout.chunk_bytes, "KV_HEADS": 8, "PAGE_SIZE": 16, "BLOCK": launch.block}
    return {**key, **value, **scales, **pages}


def main() -> None:
    """Compile everything for the capability and head_dim of the command line."""
    capability, head_dim = int(sys.argv[1]), int(sys.argv[2])
    for name, kernel, constants, options in kernels(head_dim, SHARED_MEMORY[capability]):
        print(json.dumps({"name": name, **resources(compiled(kernel, constants, capability, **options))}), flush=True)


if __name__ == "__main__":
    main()
