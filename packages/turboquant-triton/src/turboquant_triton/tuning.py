"""One configuration for each GPU and problem class, measured by ``benchmarks/kernels.py --sweep``; no autotuning."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AttendConfig:
    """Launch parameters of the attention kernels.

    Attributes:
        block: tokens of a tile.
        num_warps: warps of a program.
        num_stages: software pipeline depth.
        programs_per_sm: programs resident on one multiprocessor.
        max_registers: limit for a thread, so that so many programs fit; None leaves it to the compiler.
    """

    block: int
    num_warps: int
    num_stages: int
    programs_per_sm: int
    max_registers: int | None = None


PORTABLE = AttendConfig(block=32, num_warps=4, num_stages=1, programs_per_sm=2)


def attend_config(key_bits: int, value_bits: int, head_dim: int) -> AttendConfig:
    """Configuration of the permute kernel for a layout (``value_bits`` 16 for raw values)."""
    if value_bits == 16 or head_dim > 128:
        return AttendConfig(block=64, num_warps=2, num_stages=3, programs_per_sm=4)
    if key_bits == 4 and value_bits == 4 and head_dim > 64:
        return AttendConfig(block=128, num_warps=2, num_stages=3, programs_per_sm=6)
    return AttendConfig(block=64, num_warps=1, num_stages=3, programs_per_sm=12)
