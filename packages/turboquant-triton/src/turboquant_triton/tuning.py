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
        single_warps: the kernel of single warps (:mod:`turboquant_triton.kernels.attend_warp`).
    """

    block: int
    num_warps: int
    num_stages: int
    programs_per_sm: int
    max_registers: int | None = None
    single_warps: bool = False


PORTABLE = AttendConfig(block=32, num_warps=4, num_stages=1, programs_per_sm=2)


def attend_config(key_bits: int, value_bits: int, head_dim: int, n: int = 8) -> AttendConfig:
    """Configuration of the permute kernel, for what single warps do not take.

    No more programs than fit on a multiprocessor (``benchmarks/sass.py`` counts them): the work is dealt evenly to all,
    and those that had to wait for a place would finish last.

    Args:
        key_bits: widths as :mod:`turboquant_triton.kernels.widths` writes them.
        value_bits: the same, or 16 for raw values.
        head_dim: the larger of keys and values.
        n: query vectors of a program.
    """
    few = n <= 8
    if max(key_bits, value_bits) > 100:
        # At 2.5 bits, two times eight accumulators leave no registers for a larger tile.
        block = 32 if 302 in (key_bits, value_bits) else 64
        return AttendConfig(block=block, num_warps=1, num_stages=3, programs_per_sm=8)
    if value_bits == 16 or head_dim > 128:
        programs = 2 if value_bits == 16 and head_dim > 128 else 6 if key_bits == value_bits == 3 else 4
        return AttendConfig(block=64, num_warps=2, num_stages=3, programs_per_sm=programs)
    if key_bits == 4 and value_bits == 4 and head_dim > 64:
        if 8 < n <= 16:
            return AttendConfig(block=64, num_warps=1, num_stages=3, programs_per_sm=8)
        return AttendConfig(block=128, num_warps=2, num_stages=2 if few else 3, programs_per_sm=6 if few else 4)
    registers = 168 if few and head_dim <= 64 else None
    return AttendConfig(64, 1, num_stages=3, programs_per_sm=12 if few else 8, max_registers=registers)


def warp_config(key_bits: int, value_bits: int, head_dim: int, n: int, page_size: int) -> AttendConfig:
    """Configuration of the kernel of single warps, which attends wherever it can (``support.single_warps_supported``).

    Few warps with all the registers that a thread can have are the fastest. Where a tile would span pages, a smaller
    one spans fewer, and more warps hide the look-ups.
    """
    narrow = key_bits == value_bits == 2
    if page_size % 64 and n <= 8 and head_dim <= 128:
        return AttendConfig(64 if narrow else 32, 1, 1, programs_per_sm=12, max_registers=168, single_warps=True)
    block = 32 if head_dim > 128 and not narrow else 64
    return AttendConfig(block, 1, 1, programs_per_sm=8, max_registers=255, single_warps=True)
