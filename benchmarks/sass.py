"""Instructions of the attention kernels' inner loop, counted in machine code; needs no GPU.

Compiles the byte-permute form ahead of time, disassembles it and prints, for each class of layout: registers, spilled
bytes, shared memory, programs that fit on a multiprocessor, and the instructions of the innermost loop for each stored
coordinate (key or value) by the pipe that takes them. A multiprocessor of an H200 issues 3.85 lane instructions in the
time in which it receives one 4-bit coordinate at full bandwidth, 2.92 for one of 3 bits and 1.98 for one of 2.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import triton
from report import table

TESTS = Path(__file__).parents[1] / "packages/turboquant-triton/tests"
sys.path.insert(0, str(TESTS))

from compile_attend import attention, signature, single_warps  # noqa: E402
from compile_kernels import compiled_for, resources  # noqa: E402

from turboquant_core.testing.cases import page_layout  # noqa: E402
from turboquant_triton.attend import config_for  # noqa: E402
from turboquant_triton.kernels.attend_permute import attend_permute_kernel  # noqa: E402
from turboquant_triton.tuning import AttendConfig, attend_config  # noqa: E402

CLASSES = ((4, 4), (3, 3), (2, 2), (4, 2), (4, 16))
HEAD_DIMS = (64, 128, 256)
SHARED_PER_MULTIPROCESSOR = 227 * 1024
SHARED_RESERVED = 1024
REGISTERS = 65536
PIPES = {
    "tensor": ("HMMA", "IMMA"),
    "alu": (
        "LOP3", "PLOP3", "SHF", "PRMT", "IADD3", "VIADD", "ISETP", "SEL", "FSEL", "FMNMX", "FSETP", "IMNMX", "VIMNMX",
        "LEA", "F2FP", "MOV", "LOP", "IABS", "P2R", "R2P",
    ),
    "fma": ("FFMA", "FMUL", "FADD", "HFMA2", "HMUL2", "HADD2", "IMAD"),
    "slow": ("MUFU", "I2F", "I2FP", "F2F", "F2I"),
    "memory": ("LDS", "LDSM", "STS", "LDG", "LDGSTS", "STG", "LDL", "STL", "SHFL", "LDGDEPBAR", "DEPBAR", "BAR"),
}  # fmt: skip
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)([^;]*);")


@dataclass(frozen=True)
class Variant:
    """A class of layout and how it is launched."""

    key_bits: int
    value_bits: int
    head_dim: int
    n: int
    page_size: int
    config: AttendConfig


def compile_variant(variant: Variant, capability: int) -> Any:
    """The compiled kernel."""
    config = variant.config
    if config.single_warps:
        return compile_single_warps(variant, capability)
    constants = {
        **attention(variant.key_bits, variant.value_bits, variant.head_dim, config),
        "N": variant.n,
        "GROUP": variant.n,
        "PAGE_SIZE": variant.page_size,
        "HAS_STARTS": False,
        "TABLE": 128 if config.num_warps == 1 else 32,
        "PDL": capability >= 90,
    }
    options: dict[str, Any] = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    if config.max_registers is not None:
        options["maxnreg"] = config.max_registers
    types = signature(attend_permute_kernel, constants)
    return compiled_for(attend_permute_kernel, types, constants, capability, **options)


def compile_single_warps(variant: Variant, capability: int) -> Any:
    """The compiled kernel of single warps."""
    wanted = {"N": variant.n, "GROUP": variant.n, "BLOCK": variant.config.block, "PAGE_SIZE": variant.page_size}
    bits = (variant.key_bits, variant.value_bits)
    _, kernel, constants, _, options = single_warps(variant.head_dim, *bits, capability >= 90, **wanted)
    if variant.config.max_registers is not None:
        options["maxnreg"] = variant.config.max_registers
    return compiled_for(kernel, signature(kernel, constants), constants, capability, **options)


def instructions(cubin: bytes) -> list[tuple[int, str, str]]:
    """Address, operation and operands of each instruction."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    return [(int(address, 16), name, operands) for address, name, operands in INSTRUCTION.findall(text)]


def innermost_loop(code: list[tuple[int, str, str]]) -> list[str]:
    """Operations of the smallest loop that holds tensor-core instructions."""
    best: list[str] = []
    for address, name, operands in code:
        target = re.search(r"0x([0-9a-f]+)", operands)
        if name != "BRA" or target is None or int(target[1], 16) >= address:
            continue
        body = [operation for where, operation, _ in code if int(target[1], 16) <= where <= address]
        if PIPES["tensor"][0] in body or PIPES["tensor"][1] in body:
            best = body if not best or len(body) < len(best) else best
    return best


def pipe_of(operation: str) -> str:
    """The pipe that takes an operation."""
    return next((pipe for pipe, names in PIPES.items() if operation in names), "other")


def resident(used: dict[str, int], num_warps: int) -> int:
    """Programs that fit on a multiprocessor of sm_90."""
    per_warp = -(-used["registers"] * 32 // 256) * 256
    by_registers = REGISTERS // (per_warp * num_warps)
    by_shared = SHARED_PER_MULTIPROCESSOR // (used["shared"] + SHARED_RESERVED)
    return min(by_registers, by_shared, 32, 64 // num_warps)


def measure(variant: Variant, capability: int) -> dict[str, Any]:
    """One row of the table."""
    config = variant.config
    kernel = compile_variant(variant, capability)
    used = resources(kernel)
    loop = innermost_loop(instructions(kernel.asm["cubin"]))
    per_element = 32 * config.num_warps / (2 * config.block * variant.head_dim)
    pipes = Counter(pipe_of(operation) for operation in loop)
    fit = resident(used, config.num_warps)
    return {
        "keys / values": f"{variant.key_bits} / {variant.value_bits}",
        "head_dim": variant.head_dim,
        "N": variant.n,
        "tile, warps, stages": f"{config.block}, {config.num_warps}, {config.num_stages}",
        "registers": used["registers"],
        "spilled bytes": used["stack"],
        "shared bytes": used["shared"],
        "programs that fit / are launched per SM": f"{fit} / {config.programs_per_sm}",
        "loop": len(loop),
        "per coordinate": len(loop) * per_element,
        **{pipe: pipes[pipe] * per_element for pipe in (*PIPES, "other")},
    }


def chosen_config(key_bits: int, value_bits: int, head_dim: int, n: int, page_size: int, permute: bool) -> AttendConfig:
    """What the library launches, or with ``permute`` the kernel of plain Triton even where single warps can attend."""
    if permute:
        return attend_config(key_bits, value_bits, head_dim, n)
    fractional = {302: 2.5, 403: 3.5}
    values = None if value_bits == 16 else fractional.get(value_bits, value_bits)
    layout = page_layout(fractional.get(key_bits, key_bits), values, head_dim, page_size=page_size)
    return config_for(layout, n, True)


def variants(arguments: argparse.Namespace) -> list[Variant]:
    """What the command line asks for."""
    given = {name: value for name, value in vars(arguments).items() if name in CONFIG and value is not None}
    chosen = []
    for head_dim in arguments.head_dims:
        for bits in arguments.bits or CLASSES:
            for n in arguments.query_rows:
                config = chosen_config(*bits, head_dim, n, arguments.page_size, arguments.permute)
                chosen.append(Variant(*bits, head_dim, n, arguments.page_size, replace(config, **given)))
    return chosen


CONFIG = ("block", "num_warps", "num_stages", "max_registers")


def pair(text: str) -> tuple[int, int]:
    key_bits, value_bits = (int(part) for part in text.split("/"))
    return key_bits, value_bits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, default=90)
    parser.add_argument("--head-dims", type=int, nargs="+", default=list(HEAD_DIMS))
    parser.add_argument("--bits", type=pair, nargs="+", help="pairs: 4/4, 3/16 (raw values), 302/403 (2.5, 3.5 bits)")
    parser.add_argument("--query-rows", type=int, nargs="+", default=[8], help="query vectors of a program: 8, 16, 32")
    parser.add_argument("--page-size", type=int, default=128)
    parser.add_argument("--permute", action="store_true", help="plain Triton even where single warps can attend")
    for name in CONFIG:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help="in place of the tuned value")
    arguments = parser.parse_args()
    rows = [measure(variant, arguments.capability) for variant in variants(arguments)]
    print(f"sm_{arguments.capability}, triton {triton.__version__}, pages of {arguments.page_size} tokens\n")
    print(table(list(rows[0]), [list(row.values()) for row in rows]))


if __name__ == "__main__":
    main()
