"""The vector kernels compile for every GPU generation, without a GPU, and stay in its registers and shared memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from gpu_memory import SHARED_MEMORY

# Of a tile: keys and values, each in two pieces at 3 bits and in one for each whole width of fractional bits; scales.
LOADS = {"4/4": 4, "3/3": 6, "2/2": 4, "4/16": 3, "302/302": 8, "403/403": 8}


def compile_all(capability: int, head_dim: int, program_name: str = "compile_kernels.py") -> list[dict[str, Any]]:
    """One record for each kernel: name, registers, stack, shared (bytes) and what the program adds."""
    program = Path(__file__).with_name(program_name)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, program, str(capability), str(head_dim)], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [80, 128, 256])
@pytest.mark.parametrize("capability", sorted(SHARED_MEMORY))
def test_compiles_and_fits(capability: int, head_dim: int) -> None:
    records = compile_all(capability, head_dim)
    assert len(records) > 30
    too_large = [record for record in records if int(record["shared"]) > SHARED_MEMORY[capability]]
    assert not too_large
    if (capability, head_dim) == (90, 128):
        # A look-up declares eight bytes of stack, which nothing uses.
        assert not [record for record in records if int(record["stack"]) > 8]


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("capability", sorted(SHARED_MEMORY))
def test_both_forms_of_attention_compile(capability: int, head_dim: int) -> None:
    records = compile_all(capability, head_dim, "compile_attend.py")
    single_warps = {64: 1, 128: 5, 256: 3}.get(head_dim, 0)
    # Rotations of one vector and of a tile of them, which is for small heads.
    rotating = 4 if head_dim <= 128 else 2
    assert len(records) == (12 if head_dim % 32 == 0 else 8) + rotating + single_warps
    assert all(int(record["shared"]) <= SHARED_MEMORY[capability] for record in records)
    # Three-bit codes are unpacked from several registers of a fragment, in the order of these widths.
    orders = {str(record["name"]): record["orders"] for record in records if str(record["name"]).startswith("permute")}
    assert orders.pop("permute 4/16") == ["i8/4"]
    assert set(map(tuple, orders.values())) == {("i16/2", "i8/4")}
    if head_dim in (64, 128, 256):
        # Tiles and scales come by asynchronous copies, one for each load and step of the pipeline.
        permute = [record for record in records if str(record["name"]).startswith("permute")]
        assert len(permute) == len(LOADS)
        for record in permute:
            assert record["copies"] == record["stages"] * LOADS[str(record["name"]).split()[1]]
    if (capability, head_dim) == (90, 128):
        # Accumulators of 2.5 bits, two times eight, leave a few bytes to spill.
        spilled = {record["name"]: int(record["stack"]) for record in records if "portable" not in str(record["name"])}
        assert spilled.pop("permute 302/302") <= 56
        assert not any(spilled.values())


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("capability", sorted(SHARED_MEMORY))
def test_exact_rows_compile(capability: int, head_dim: int) -> None:
    records = compile_all(capability, head_dim, "compile_exact.py")
    assert len(records) == 24
    assert all(int(record["shared"]) <= SHARED_MEMORY[capability] for record in records)
    if (capability, head_dim) == (90, 128):
        assert not [record for record in records if record["stack"] and "fp32" not in str(record["name"])]
