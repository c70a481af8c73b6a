"""What the launchers of encode, store, decode, gather and scores share: operands of the rotation, launch parameters."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from turboquant_core import LayoutError, PageLayout, RawLayout, VectorLayout

from .device import hadamard_fp16, hadamard_int8, indexed, multiprocessors, shared_memory
from .support import LARGEST_HEAD_DIM, head_dim_multiple

_SCORE_TILES = 8
# A warp's share of a product.
_WARP_ROWS = 16
_WARP_COLUMNS = 32


@dataclass(frozen=True, slots=True)
class RowsConfig:
    """Launch parameters of a kernel that works on rows, one vector each: rows of a tile, warps, pipeline depth."""

    block: int
    num_warps: int
    num_stages: int


# Warps share its rows, at most 32 coordinates each: few rows wait for the longest chain of instructions.
SMALL = RowsConfig(block=16, num_warps=8, num_stages=1)
# Asynchronous copies pass by the first-level cache, which holds the matrix for all programs of a multiprocessor.
LARGE = RowsConfig(block=64, num_warps=4, num_stages=1)


def padded(head_dim: int) -> int:
    """Width of a tile that holds ``head_dim`` coordinates: a power of two."""
    return 1 << (head_dim - 1).bit_length()


def rows_config(rows: int, device: torch.device, *layouts: VectorLayout | RawLayout) -> RowsConfig:
    """Parameters for ``rows`` vectors of each of ``layouts`` on ``device``."""
    return fitted(launch_parameters(rows, multiprocessors(device)), shared_memory(device), *layouts)


@lru_cache(maxsize=256)
def fitted(config: RowsConfig, shared_bytes: int, *layouts: VectorLayout | RawLayout) -> RowsConfig:
    """``config`` with no more warps than there is work for in a tile of each of ``layouts``.

    Nor more than rotate a part of the matrix that fits into ``shared_bytes``, beside the rows.
    """
    shares = max(min(positions(layout) for layout in layouts) // _WARP_COLUMNS, 1)
    longest = max(padded(layout.head_dim) for layout in layouts)
    fitting = (shared_bytes - 2 * longest * _WARP_ROWS * 2) // (2 * longest * _WARP_COLUMNS)
    shares = min(shares, 1 << max(fitting.bit_length() - 1, 0))
    return replace(config, num_warps=min(config.num_warps, shares * max(config.block // _WARP_ROWS, 1)))


def launch_parameters(rows: int, multiprocessor_count: int) -> RowsConfig:
    """Few rows take the smallest tile, so that they spread over the GPU; many take one that fills the tensor cores."""
    return LARGE if rows >= LARGE.block * multiprocessor_count else SMALL


def decode_block(rows: int, head_dim: int, device: torch.device, rotated: bool = False) -> int:
    """Rows of a tile of decode and gather, which hold the levels of all its positions at once.

    A small tile reads the whole matrix of the inverse rotation for few rows. Levels that stay ``rotated`` need none,
    and more registers to be put in order.
    """
    if rotated and padded(head_dim) > 128:
        return SMALL.block
    return launch_parameters(rows, multiprocessors(device)).block


def decode_columns(head_dim: int, block: int) -> int:
    """Coordinates that one product of the inverse rotation gives: fewer where the levels leave few registers."""
    return min(padded(head_dim), 16 if padded(head_dim) * block > 128 * LARGE.block else 32)


def positions(layout: VectorLayout | RawLayout) -> int:
    """Positions of a tile that have codes of one width."""
    return padded(layout.head_dim // (2 if isinstance(layout, VectorLayout) and layout.is_mixed else 1))


def part_columns(layout: VectorLayout | RawLayout, config: RowsConfig) -> int:
    """Positions of a tile that are rotated at a time: so many for each of the warps that share its rows.

    A warp that has rows of its own takes a quarter of them, between what fits and what a product takes.
    """
    sharing = config.num_warps * _WARP_ROWS // config.block
    if sharing > 1:
        return min(positions(layout), _WARP_COLUMNS * sharing)
    return min(max(positions(layout) // 4, min(positions(layout) // 2, 16)), _WARP_COLUMNS)


@lru_cache(maxsize=256)
def bits_code(layout: VectorLayout) -> int:
    """What kernels take as ``BITS`` (:mod:`turboquant_triton.kernels.widths`)."""
    widths = [part.width for part in layout.parts]
    return widths[0] if len(widths) == 1 else 100 * widths[0] + widths[1]


@dataclass(frozen=True, slots=True)
class ScoresConfig:
    """Launch parameters of the scores kernel: queries of a program, keys of a tile, tiles of a program."""

    block: int
    keys: int
    tiles: int


def scores_config(kv_len: int, head_dim: int) -> ScoresConfig:
    """Parameters for ``kv_len`` keys: a program reads its queries once for several tiles."""
    keys = 32 if padded(head_dim) > 128 else 64
    return ScoresConfig(16, keys, min(-(-kv_len // keys), _SCORE_TILES))


def coordinates(head_dim: int, bits: float) -> list[int]:
    """Coordinate at each position of a tile, -1 for padding; with two code widths one half after the other.

    A code row is a sequence of units of 32 bits (16 at 3 bits) with the same fields. Positions run over the units of
    the first field, then of the second: the codes of a unit then lie in the registers of one thread.
    """
    if bits != int(bits):
        half = head_dim // 2
        second = coordinates(half, int(bits))
        return coordinates(half, int(bits) + 1) + [half + index if index >= 0 else -1 for index in second]
    groups, fields = {4: (1, 8), 3: (4, 4), 2: (2, 8)}[int(bits)]
    units = padded(head_dim) // (groups * fields)
    inside = head_dim // groups
    order = []
    for group in range(groups):
        for field in range(fields):
            indices = (fields * unit + field for unit in range(units))
            order += [group * inside + index if index < inside else -1 for index in indices]
    return order


@lru_cache(maxsize=64)
def rotation_operand(head_dim: int, bits: float, device: torch.device) -> Tensor:
    """Hadamard matrix as a kernel multiplies with it: fp16 ``[positions, padded coordinates]``, padding zero.

    Row ``p`` is the matrix's row of coordinate ``coordinates(head_dim, bits)[p]``. Made at the first call: make that
    call before capturing a CUDA graph.
    """
    matrix = torch.zeros(padded(head_dim), padded(head_dim), dtype=torch.float16)
    order = torch.tensor(coordinates(head_dim, bits))
    matrix[order >= 0, :head_dim] = hadamard_int8(head_dim, torch.device("cpu"))[order[order >= 0]].half()
    return matrix.to(device)


def make_constants(layout: PageLayout, device: torch.device) -> None:
    """Make the matrices that the kernels of ``layout`` read on ``device``.

    Before any call, so that none makes them inside a CUDA graph, whose memory is not theirs to keep.
    """
    device = indexed(device)
    for vector in (layout.key, layout.value):
        if isinstance(vector, VectorLayout):
            rotation_operand(vector.head_dim, vector.bits, device)
            hadamard_fp16(vector.head_dim, device, vector is layout.value)


def unit_dtype(layout: VectorLayout) -> torch.dtype:
    """Integer by which a code row is addressed: its parts and its start are multiples of it."""
    return torch.int32 if layout.bits in (2, 4) else torch.int16


def aligned(codes: Tensor, layout: VectorLayout) -> Tensor:
    """Bytes that are contiguous and start at a multiple of the unit; copied only when they do not."""
    contiguous = codes.contiguous()
    return contiguous.clone() if contiguous.storage_offset() % unit_dtype(layout).itemsize else contiguous


def adjacent(x: Tensor) -> Tensor:
    """``x`` with adjacent coordinates in a dtype that the kernels read; copied only when it is not so already."""
    if x.dtype == torch.float64:
        x = x.to(torch.float32)
    return x if x.stride(-1) == 1 else x.contiguous()


def check_packable(layout: VectorLayout) -> None:
    """Raise ``LayoutError`` for a head_dim whose code rows are not whole units."""
    multiple = head_dim_multiple(layout)
    if layout.head_dim % multiple or layout.head_dim > LARGEST_HEAD_DIM:
        raise LayoutError(
            f"head_dim is {layout.head_dim}; the Triton kernels take multiples of {multiple} up to {LARGEST_HEAD_DIM} "
            f"at {layout.bits} bits: use the reference provider or keep this layer uncompressed"
        )
