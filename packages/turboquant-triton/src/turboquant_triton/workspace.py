"""Scratch memory of attention: what each kernel hands to the next, carved from one allocation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from turboquant_core import PageLayout

from .kernels.attend_plan import PLAN_FIELDS

_ALIGNMENT = 256
_PORTABLE_N = 16
_WIDEST_N = 32
# Few widths: each is a compilation of its own, and a batch grows and shrinks with every step of a server.
_SEARCH_WIDTHS = (32, 256, 1024)


@dataclass(frozen=True, slots=True)
class AttendShape:
    """How query heads and tokens are grouped.

    Attributes:
        rows: sequences, or query tokens when their number differs from sequence to sequence.
        q_len: query tokens of a row.
        group: query heads of a KV head.
        n: query vectors that one program holds.
        chunks: programs' worth of query vectors of a (row, KV head).
        kv_heads: KV heads.
    """

    rows: int
    q_len: int
    group: int
    n: int
    chunks: int
    kv_heads: int

    @classmethod
    def build(cls, rows: int, q_len: int, group: int, kv_heads: int, permute: bool) -> AttendShape:
        """Choose ``n`` and ``chunks``: as few passes over the cache as the registers allow."""
        wanted = max(8, 1 << (q_len * group - 1).bit_length())
        n = min(wanted, _WIDEST_N) if permute else _PORTABLE_N
        return cls(rows, q_len, group, n, -(-q_len * group // n), kv_heads)

    @classmethod
    def of(cls, layout: PageLayout, query: Tensor, seq_lens: Tensor, ragged: bool, permute: bool) -> AttendShape:
        """Grouping of a call.

        Raises:
            ValueError: without ``query_start_loc`` the tokens do not divide by the batch.
        """
        tokens, batch = query.shape[0], seq_lens.shape[0]
        group = query.shape[1] // layout.kv_heads
        if ragged:
            return cls.build(tokens, 1, group, layout.kv_heads, permute)
        if tokens % batch:
            raise ValueError(f"{tokens} query tokens do not divide by the batch of {batch}; pass query_start_loc")
        return cls.build(batch, max(tokens // batch, 1), group, layout.kv_heads, permute)

    @property
    def items(self) -> int:
        """(row, KV head, chunk) triples."""
        return self.rows * self.kv_heads * self.chunks

    @property
    def rows_block(self) -> int:
        """Rows that one program looks at together when it searches the plan."""
        return next((width for width in _SEARCH_WIDTHS if self.rows <= width), _SEARCH_WIDTHS[-1])


@dataclass(frozen=True, slots=True)
class Workspace:
    """Flat views from where each part of the scratch memory begins; what they hold, :func:`sections` says."""

    query: Tensor
    query_stats: Tensor
    plan: Tensor
    partial: Tensor
    stats: Tensor


def sections(
    shape: AttendShape, programs: int, layout: PageLayout, permute: bool
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of each part."""
    slots = shape.items + programs
    query = torch.int8 if permute else torch.float32
    return {
        "query": (query, (shape.items, shape.n, layout.key.head_dim)),
        "query_stats": (torch.float32, (shape.items, 2, shape.n)),
        "plan": (torch.int32, (PLAN_FIELDS.value, shape.rows)),
        "partial": (torch.float32, (slots, shape.n, layout.value.head_dim)),
        "stats": (torch.float32, (slots, 2, shape.n)),
    }


def _nbytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return -(-dtype.itemsize * math.prod(shape) // _ALIGNMENT) * _ALIGNMENT


def workspace_bytes(shape: AttendShape, programs: int, layout: PageLayout, permute: bool) -> int:
    """Bytes that :func:`carve` needs. Grows with queries and programs, not with the context."""
    return _extents(shape, programs, layout, permute)[1]


@lru_cache(maxsize=1024)
def _extents(
    shape: AttendShape, programs: int, layout: PageLayout, permute: bool
) -> tuple[dict[str, tuple[torch.dtype, int]], int]:
    """Dtype and first element of each part, and the bytes of all; the host asks in each step of each layer."""
    starts, start = {}, 0
    for name, (dtype, extent) in sections(shape, programs, layout, permute).items():
        starts[name] = (dtype, start // dtype.itemsize)
        start += _nbytes(dtype, extent)
    return starts, start


def carve(
    workspace: Tensor | None,
    shape: AttendShape,
    programs: int,
    layout: PageLayout,
    device: torch.device,
    permute: bool,
) -> Workspace:
    """Cut ``workspace`` into views, or allocate it.

    Raises:
        ValueError: ``workspace`` is too small or no contiguous uint8 vector.
    """
    starts, needed = _extents(shape, programs, layout, permute)
    if workspace is None:
        workspace = torch.empty(needed, dtype=torch.uint8, device=device)
    elif workspace.dtype != torch.uint8 or workspace.dim() != 1 or workspace.numel() < needed:
        raise ValueError(
            f"workspace is {workspace.dtype} {tuple(workspace.shape)}; it must be a torch.uint8 vector of at least "
            f"{needed} bytes: ask workspace_bytes()"
        )
    typed = {dtype: workspace[:needed].view(dtype) for dtype in {dtype for dtype, _ in starts.values()}}
    return Workspace(**{name: typed[dtype][start:] for name, (dtype, start) in starts.items()})
