"""Instructions that encoding takes a coordinate, counted in machine code; needs no GPU.

Compiles the kernel ahead of time and disassembles it, for each width, form of the codebook and scale rule, as a prefill
launches it (``turboquant_triton.launch.LARGE``). A loop goes over the parts into which the coordinates of a vector fall
and counts as often as it runs; everything else runs once.
"""

from __future__ import annotations

import argparse
import re
from itertools import product
from typing import Any, get_args

import triton
from report import table
from sass import instructions

from compile_kernels import compiled, resources  # isort: skip (sass adds the folder of these)

from turboquant_core import VectorLayout
from turboquant_core.layout import Form
from turboquant_core.scale import CACHE_RULE, ScaleRule
from turboquant_triton.kernels.encode import encode_kernel
from turboquant_triton.launch import LARGE, bits_code, padded, part_columns

BITS = (4, 3.5, 3, 2.5, 2)
RULES: tuple[ScaleRule, ...] = (CACHE_RULE, "unbiased")


def loop_lengths(code: list[tuple[int, str, str]]) -> list[int]:
    """Instructions of each loop; of loops within one another, each counts what is in it."""
    lengths = []
    for address, name, operands in code:
        target = re.search(r"0x([0-9a-f]+)", operands)
        if name == "BRA" and target is not None and int(target[1], 16) < address:
            lengths.append(sum(int(target[1], 16) <= where <= address for where, _, _ in code))
    return lengths


def measure(layout: VectorLayout, rule: ScaleRule, capability: int) -> dict[str, Any]:
    """One row of the table."""
    columns = part_columns(layout, LARGE)
    constants = {
        "D": layout.head_dim, "BITS": bits_code(layout), "INT8": layout.form == "int8", "COLUMNS": columns,
        "BLOCK": LARGE.block, "RULE": rule, "HAS_CENTER": False, "SPLIT": False,
    }  # fmt: skip
    launch = {"num_warps": LARGE.num_warps, "num_stages": LARGE.num_stages}
    kernel = compiled(encode_kernel, constants, capability, **launch)
    code = [one for one in instructions(kernel.asm["cubin"]) if one[1] != "NOP"]
    parts = padded(layout.head_dim // 2 if layout.is_mixed else layout.head_dim) // columns
    total = len(code) + (parts - 1) * sum(loop_lengths(code))
    used = resources(kernel)
    return {
        "bits": layout.bits,
        "form": layout.form,
        "head_dim": layout.head_dim,
        "scale rule": rule,
        "registers": used["registers"],
        "bytes of stack": used["stack"],
        "shared bytes": used["shared"],
        "instructions of a thread": total,
        "per coordinate": total * 32 * LARGE.num_warps / (LARGE.block * layout.head_dim),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, default=90)
    parser.add_argument("--head-dims", type=int, nargs="+", default=[128])
    parser.add_argument("--bits", type=float, nargs="+", default=list(BITS))
    parser.add_argument("--rules", nargs="+", default=list(RULES))
    arguments = parser.parse_args()
    cases = product(arguments.head_dims, arguments.bits, get_args(Form), arguments.rules)
    rows = [measure(VectorLayout(dim, bits, form), rule, arguments.capability) for dim, bits, form, rule in cases]
    print(f"sm_{arguments.capability}, triton {triton.__version__}, {LARGE.block} rows, {LARGE.num_warps} warps\n")
    print(table(list(rows[0]), [list(row.values()) for row in rows]))


if __name__ == "__main__":
    main()
