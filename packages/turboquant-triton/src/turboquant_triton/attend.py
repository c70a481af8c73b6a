"""Launch attention over packed pages: prepare, attend, merge."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from turboquant_core import Attended, CacheCodec, KernelRequest, PageLayout, RawLayout, VectorLayout
from turboquant_core.codec import check_center

from .checks import check_attend
from .device import hadamard_fp16, has_dependent_launch, multiprocessors
from .kernels.attend_merge import attend_merge_kernel
from .kernels.attend_permute import attend_permute_kernel
from .kernels.attend_portable import attend_portable_kernel
from .kernels.attend_prepare import attend_prepare_kernel
from .kernels.unpack_asm import cubic_levels, int8_levels
from .launch import bits_code, padded
from .support import single_warps_supported
from .tuning import PORTABLE, AttendConfig, attend_config, warp_config
from .workspace import AttendShape, Workspace, carve, workspace_bytes

_RAW_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
_WEIGHT_SHIFT = 2.0**15
_MERGE_TILE = 128 * 128
# A tile of the tensor cores.
_ROWS_TOGETHER = 16


@dataclass(frozen=True, slots=True)
class AttendOptions:
    """Arguments of :meth:`turboquant_core.KernelProvider.attend` that do not depend on the data.

    ``skip_first`` and ``skip_last`` are those of :meth:`turboquant_core.exact.ExactRowsProvider.attend_between`.
    """

    scaling: float
    window: int | None
    softcap: float | None
    skip_first: int = 0
    skip_last: int = 0


def value_bits(layout: PageLayout) -> int:
    """What kernels take as the width of a stored value: that of its codes, or the bits of a raw float."""
    return 8 * layout.value.itemsize if isinstance(layout.value, RawLayout) else bits_code(layout.value)


def config_for(layout: PageLayout, n: int, permute: bool) -> AttendConfig:
    """Launch parameters for a layout and ``n`` query vectors a program, and with them the kernel."""
    if not permute:
        return PORTABLE
    head_dim = max(layout.key.head_dim, layout.value.head_dim)
    if single_warps_supported(layout, n):
        return warp_config(bits_code(layout.key), value_bits(layout), head_dim, n, layout.page_size)
    return attend_config(bits_code(layout.key), value_bits(layout), head_dim, n)


def attend(
    query: Tensor,
    pages: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    codec: CacheCodec,
    options: AttendOptions,
    *,
    query_start_loc: Tensor | None,
    seq_starts: Tensor | None,
    sinks: Tensor | None,
    out: Tensor | None,
    workspace: Tensor | None,
    permute: bool,
) -> Attended:
    """Attention of :meth:`turboquant_core.KernelProvider.attend`; ``permute`` chooses the kernel.

    Raises:
        ValueError: shapes or dtypes do not fit, or the workspace is too small.
    """
    check_attend(
        query,
        pages,
        block_table,
        seq_lens,
        codec.layout,
        query_start_loc,
        seq_starts,
        options.window,
        options.softcap,
        sinks,
        out,
    )
    check_center(codec, options.softcap, sinks)
    layout = codec.layout
    shape = AttendShape.of(layout, query, seq_lens, query_start_loc is not None, permute)
    config = config_for(layout, shape.n, permute)
    out = query.new_empty((*query.shape[:2], layout.value.head_dim)) if out is None else out
    lse = query.new_empty(query.shape[:2], dtype=torch.float32)
    if query.shape[0] == 0:
        return Attended(out, lse)
    programs = config.programs_per_sm * multiprocessors(query.device)
    space = carve(workspace, shape, programs, layout, query.device, permute)
    _prepare(query, seq_lens, query_start_loc, seq_starts, codec, options, shape, config, space, permute)
    run = _portable if not permute else _single_warps if config.single_warps else _permute
    has_starts = seq_starts is not None or options.skip_first > 0
    run(query, pages, block_table, codec, options, shape, config, space, programs, has_starts)
    _merge(codec, sinks, out, lse, shape, space, programs, permute)
    return Attended(out, lse)


def attend_workspace_bytes(request: KernelRequest, tokens: int, batch: int, permute: bool) -> int:
    """Scratch bytes of any call with ``tokens`` queries of ``batch`` sequences, of equal length or not."""
    heads, group = request.layout.kv_heads, request.group_size
    equal = AttendShape.build(batch, max(tokens // max(batch, 1), 1), group, heads, permute)
    ragged = AttendShape.build(max(tokens, 1), 1, group, heads, permute)
    return max(_shape_bytes(shape, request, permute) for shape in (equal, ragged))


def _shape_bytes(shape: AttendShape, request: KernelRequest, permute: bool) -> int:
    config = config_for(request.layout, shape.n, permute)
    programs = config.programs_per_sm * multiprocessors(request.device)
    return workspace_bytes(shape, programs, request.layout, permute)


def _pieces(shape: AttendShape, programs: int, value_dim: int, vectors: int) -> int:
    """Pieces of an item that the merge reads together: about as many as an item has when all are of one length.

    A power of 4, so that few are compiled; for a tile of vectors the least, which is what registers hold.
    """
    expected = programs // shape.items + 2
    most = _MERGE_TILE // value_dim if vectors == 1 else 4
    return min(max(1 << 2 * -(-(expected - 1).bit_length() // 2), 4), most)


def _vectors_together(query: Tensor, head_dim: int) -> int:
    """Query vectors that one program rotates.

    One, so that a few spread over the GPU; a tile once there is more than one for each multiprocessor, since each
    program reads the whole matrix. That of more than 128 coordinates would not fit into every GPU's shared memory.
    """
    many = query.shape[0] * query.shape[1] > multiprocessors(query.device)
    return _ROWS_TOGETHER if many and padded(head_dim) <= 128 else 1


def _prepare(
    query: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor | None,
    seq_starts: Tensor | None,
    codec: CacheCodec,
    options: AttendOptions,
    shape: AttendShape,
    config: AttendConfig,
    space: Workspace,
    permute: bool,
) -> None:
    query = query if query.stride(-1) == 1 else query.contiguous()
    multiplier = options.scaling * math.log2(math.e)
    if permute:
        multiplier *= int8_levels(codec.layout.key.parts[0].width).step
    vectors = query.shape[0] * query.shape[1]
    together = _vectors_together(query, codec.layout.key.head_dim)
    attend_prepare_kernel[(-(-vectors // together) + 1,)](
        query,
        hadamard_fp16(codec.layout.key.head_dim, query.device, False),
        codec.key.signs,
        space.query,
        space.query_stats,
        seq_lens,
        seq_lens if seq_starts is None else seq_starts,
        seq_lens if query_start_loc is None else query_start_loc,
        space.plan,
        shape.rows,
        seq_lens.shape[0],
        vectors,
        query.stride(0),
        query.stride(1),
        multiplier,
        options.window or 0,
        D=codec.layout.key.head_dim,
        KV_HEADS=codec.layout.kv_heads,
        CHUNKS=shape.chunks,
        GROUP=shape.group,
        Q_LEN=shape.q_len,
        N=shape.n,
        BLOCK=config.block,
        QUANTIZE=permute,
        RAGGED=query_start_loc is not None,
        HAS_STARTS=seq_starts is not None,
        HAS_WINDOW=options.window is not None,
        SKIP_FIRST=options.skip_first,
        SKIP_LAST=options.skip_last,
        ROWS_BLOCK=shape.rows_block,
        KEY_BITS=bits_code(codec.layout.key),
        VECTORS=together,
        PDL=permute and has_dependent_launch(query.device),
        num_warps=8,
    )


def _constants(
    query: Tensor, layout: PageLayout, options: AttendOptions, shape: AttendShape, config: AttendConfig
) -> dict[str, Any]:
    """Compile-time arguments and launch parameters that both forms share."""
    return {
        "D": layout.key.head_dim,
        "VALUE_DIM": layout.value.head_dim,
        "KEY_BITS": bits_code(layout.key),
        "VALUE_BITS": value_bits(layout),
        "RAW_TYPE": _RAW_TYPES[query.dtype],
        "PAGE_SIZE": layout.page_size,
        "EXACT_BYTES": layout.exact_bytes,
        "KV_HEADS": layout.kv_heads,
        "CHUNKS": shape.chunks,
        "GROUP": shape.group,
        "Q_LEN": shape.q_len,
        "N": shape.n,
        "BLOCK": config.block,
        "HAS_WINDOW": options.window is not None,
        "HAS_SOFTCAP": options.softcap is not None,
        "ROWS_BLOCK": shape.rows_block,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def _permute(
    query: Tensor,
    pages: Tensor,
    block_table: Tensor,
    codec: CacheCodec,
    options: AttendOptions,
    shape: AttendShape,
    config: AttendConfig,
    space: Workspace,
    programs: int,
    has_starts: bool,
) -> None:
    layout = codec.layout
    pdl = has_dependent_launch(query.device)
    attend_permute_kernel[(programs,)](
        space.query,
        space.query_stats,
        pages.view(torch.int8),
        block_table,
        space.plan,
        space.partial,
        space.stats,
        shape.rows,
        block_table.stride(0),
        layout.page_bytes,
        (options.softcap or 0.0) * math.log2(math.e),
        options.window or 0,
        **_constants(query, layout, options, shape, config),
        HAS_STARTS=has_starts,
        TABLE=128 if config.num_warps == 1 else 32,
        PDL=pdl,
        launch_pdl=pdl,
        maxnreg=config.max_registers,
    )


def _single_warps(
    query: Tensor,
    pages: Tensor,
    block_table: Tensor,
    codec: CacheCodec,
    options: AttendOptions,
    shape: AttendShape,
    config: AttendConfig,
    space: Workspace,
    programs: int,
    has_starts: bool,
) -> None:
    from .kernels.attend_warp import attend_warp_kernel

    layout = codec.layout
    pdl = has_dependent_launch(query.device)
    attend_warp_kernel[(programs,)](
        space.query,
        space.query_stats,
        pages.view(torch.int8),
        block_table,
        space.plan,
        space.partial,
        space.stats,
        shape.rows,
        block_table.stride(0),
        layout.page_bytes,
        (options.softcap or 0.0) * math.log2(math.e),
        options.window or 0,
        D=layout.key.head_dim,
        VALUE_DIM=layout.value.head_dim,
        KEY_BITS=bits_code(layout.key),
        VALUE_BITS=value_bits(layout),
        PAGE_SIZE=layout.page_size,
        CHUNK_BYTES=layout.chunk_bytes,
        KV_HEADS=layout.kv_heads,
        CHUNKS=shape.chunks,
        GROUP=shape.group,
        Q_LEN=shape.q_len,
        N=shape.n,
        BLOCK=config.block,
        HAS_STARTS=has_starts,
        HAS_WINDOW=options.window is not None,
        HAS_SOFTCAP=options.softcap is not None,
        ROWS_BLOCK=shape.rows_block,
        PDL=pdl,
        num_warps=1,
        launch_pdl=pdl,
        maxnreg=config.max_registers,
    )


def _portable(
    query: Tensor,
    pages: Tensor,
    block_table: Tensor,
    codec: CacheCodec,
    options: AttendOptions,
    shape: AttendShape,
    config: AttendConfig,
    space: Workspace,
    programs: int,
    has_starts: bool,
) -> None:
    layout = codec.layout
    raw = isinstance(layout.value, RawLayout)
    attend_portable_kernel[(programs,)](
        space.query,
        pages,
        block_table,
        space.plan,
        space.partial,
        space.stats,
        codec.key.levels,
        codec.key.levels if codec.value is None else codec.value.levels,
        shape.rows,
        block_table.stride(0),
        layout.page_bytes,
        (options.softcap or 0.0) * math.log2(math.e),
        options.window or 0,
        **_constants(query, layout, options, shape, config),
        KEY_INT8=layout.key.form == "int8",
        VALUE_INT8=not isinstance(layout.value, RawLayout) and layout.value.form == "int8",
        RAW_BITS=value_bits(layout) if raw else 0,
    )


def _merge(
    codec: CacheCodec,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor,
    shape: AttendShape,
    space: Workspace,
    programs: int,
    permute: bool,
) -> None:
    layout = codec.layout
    rotated = codec.value is not None
    scale = 1.0
    if permute and isinstance(layout.value, VectorLayout):
        scale = cubic_levels(layout.value.parts[0].width).step / _WEIGHT_SHIFT
    value_dim = layout.value.head_dim
    pdl = permute and has_dependent_launch(out.device)
    vectors = out.shape[0] * out.shape[1]
    together = _vectors_together(out, value_dim)
    attend_merge_kernel[(-(-vectors // together),)](
        space.partial,
        space.stats,
        space.plan,
        hadamard_fp16(value_dim, out.device, True) if rotated else space.plan,
        codec.value.signs if codec.value is not None else space.stats,
        space.stats if sinks is None else sinks,
        out,
        lse,
        shape.rows,
        programs,
        vectors,
        scale,
        D=value_dim,
        KV_HEADS=layout.kv_heads,
        CHUNKS=shape.chunks,
        GROUP=shape.group,
        Q_LEN=shape.q_len,
        N=shape.n,
        ROTATED=rotated,
        HAS_SINKS=sinks is not None,
        PIECES=_pieces(shape, programs, padded(value_dim), together),
        VECTORS=together,
        PDL=pdl,
        num_warps=8,
        launch_pdl=pdl,
    )
