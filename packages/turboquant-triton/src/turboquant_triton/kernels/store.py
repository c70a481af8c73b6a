"""Keys and values straight into their pages, both in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from turboquant_core import CacheCodec, Codec, RawLayout, VectorLayout

from ..input_checks import check_store
from ..launch import RowsConfig, adjacent, bits_code, part_columns, rotation_operand, rows_config, unit_dtype
from .encode import encode_rows, needs_split
from .pack import store_units
from .widths import row_bytes, unit_bytes


@triton.jit
def load_slots(slot_mapping, row, rows, slots, KV_HEADS: tl.constexpr, PAGE_SIZE: tl.constexpr):
    """Chunk and token inside it of each row (a token of a KV head), and whether its slot is to be written."""
    token = row // KV_HEADS
    slot = tl.load(slot_mapping + token, mask=row < rows, other=-1).to(tl.int64)
    valid = (slot >= 0) & (slot < slots)
    slot = tl.where(valid, slot, 0)
    return (slot // PAGE_SIZE) * KV_HEADS + row % KV_HEADS, slot % PAGE_SIZE, valid


@triton.jit
def store_packed(
    x,
    center,  # float32 [KV_HEADS, D]
    signs,
    matrix,
    boundaries,
    levels,
    units,  # the pages as units of the code rows
    scales,  # the pages as fp16
    slot_mapping,
    rows,
    slots,
    token_stride,
    head_stride,
    block,
    D: tl.constexpr,
    BITS: tl.constexpr,
    INT8: tl.constexpr,
    RULE: tl.constexpr,
    HAS_CENTER: tl.constexpr,
    SPLIT: tl.constexpr,
    COLUMNS: tl.constexpr,
    CODE_OFFSET: tl.constexpr,
    SCALE_OFFSET: tl.constexpr,
    CHUNK_BYTES: tl.constexpr,
    KV_HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Encode tile number ``block`` of the rows into its slots."""
    UNIT_BYTES: tl.constexpr = unit_bytes(BITS)
    row = block * BLOCK + tl.arange(0, BLOCK)
    chunk, token, valid = load_slots(slot_mapping, row, rows, slots, KV_HEADS, PAGE_SIZE)
    head = row % KV_HEADS
    source = x + (row // KV_HEADS).to(tl.int64) * token_stride + head.to(tl.int64) * head_stride
    words, scale = encode_rows(
        source, center + head * D, valid, signs, matrix, boundaries, levels,
        D, BITS, INT8, RULE, HAS_CENTER, SPLIT, COLUMNS,
    )  # fmt: skip
    target = chunk * (CHUNK_BYTES // UNIT_BYTES) + CODE_OFFSET // UNIT_BYTES
    store_units(units + target + token * (row_bytes(D, BITS) // UNIT_BYTES), words, valid, BITS, D)
    tl.store(scales + chunk * (CHUNK_BYTES // 2) + SCALE_OFFSET // 2 + token, scale, mask=valid)


@triton.jit
def store_raw(
    x,
    pages,  # in the dtype of x
    slot_mapping,
    rows,
    slots,
    token_stride,
    head_stride,
    block,
    D: tl.constexpr,
    OFFSET: tl.constexpr,
    CHUNK: tl.constexpr,
    KV_HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copy tile number ``block`` of the rows; ``OFFSET`` and ``CHUNK`` count elements."""
    d = tl.arange(0, triton.next_power_of_2(D))[None, :]
    row = block * BLOCK + tl.arange(0, BLOCK)
    chunk, token, valid = load_slots(slot_mapping, row, rows, slots, KV_HEADS, PAGE_SIZE)
    source = x + (row // KV_HEADS).to(tl.int64) * token_stride + (row % KV_HEADS).to(tl.int64) * head_stride
    mask = valid[:, None] & (d < D)
    value = tl.load(source[:, None] + d, mask=mask)
    tl.store(pages + (chunk * CHUNK + OFFSET + token * D)[:, None] + d, value, mask=mask)


@triton.jit(do_not_specialize=["rows", "slots"])
def store_kernel(
    key,
    value,
    center,
    key_signs,
    key_matrix,
    key_boundaries,
    key_levels,
    value_signs,
    value_matrix,
    value_boundaries,
    value_levels,
    key_units,
    value_units,  # the pages as units of the value rows, or in the values' dtype when these are raw
    scales,
    slot_mapping,
    rows,
    slots,
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    D: tl.constexpr,
    BITS: tl.constexpr,
    INT8: tl.constexpr,
    RULE: tl.constexpr,
    HAS_CENTER: tl.constexpr,
    SPLIT: tl.constexpr,
    COLUMNS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_BITS: tl.constexpr,  # those of a float when raw
    VALUE_INT8: tl.constexpr,
    VALUE_RULE: tl.constexpr,
    VALUE_SPLIT: tl.constexpr,
    VALUE_COLUMNS: tl.constexpr,
    RAW: tl.constexpr,
    VALUE_OFFSET: tl.constexpr,
    KEY_SCALE_OFFSET: tl.constexpr,
    VALUE_SCALE_OFFSET: tl.constexpr,
    CHUNK_BYTES: tl.constexpr,
    KV_HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0) // 2
    if tl.program_id(0) % 2 == 0:
        store_packed(
            key, center, key_signs, key_matrix, key_boundaries, key_levels, key_units, scales, slot_mapping,
            rows, slots, key_token_stride, key_head_stride, block,
            D, BITS, INT8, RULE, HAS_CENTER, SPLIT, COLUMNS,
            0, KEY_SCALE_OFFSET, CHUNK_BYTES, KV_HEADS, PAGE_SIZE, BLOCK,
        )  # fmt: skip
    elif RAW:
        store_raw(
            value, value_units, slot_mapping,
            rows, slots, value_token_stride, value_head_stride, block,
            VALUE_DIM, VALUE_OFFSET * 8 // VALUE_BITS, CHUNK_BYTES * 8 // VALUE_BITS, KV_HEADS, PAGE_SIZE, BLOCK,
        )  # fmt: skip
    else:
        store_packed(
            value, center, value_signs, value_matrix, value_boundaries, value_levels, value_units, scales, slot_mapping,
            rows, slots, value_token_stride, value_head_stride, block,
            VALUE_DIM, VALUE_BITS, VALUE_INT8, VALUE_RULE, False, VALUE_SPLIT, VALUE_COLUMNS,
            VALUE_OFFSET, VALUE_SCALE_OFFSET, CHUNK_BYTES, KV_HEADS, PAGE_SIZE, BLOCK,
        )  # fmt: skip


def store(key: Tensor, value: Tensor, pages: Tensor, slot_mapping: Tensor, codec: CacheCodec) -> None:
    """:meth:`turboquant_core.KernelProvider.store` in one launch, without waiting for the device.

    A slot outside the pages is skipped like -1 on a GPU, where the host does not see it; the interpreter raises.

    Raises:
        ValueError: shapes, dtypes or devices do not fit the layout.
    """
    check_store(key, value, pages, slot_mapping, codec)
    rows = key.shape[0] * codec.layout.kv_heads
    if rows == 0:
        return
    key, value = adjacent(key), adjacent(value)
    config = rows_config(rows, key.device, codec.layout.key, codec.layout.value)
    store_kernel[(2 * -(-rows // config.block),)](
        key,
        value,
        codec.key.signs if codec.key.center is None else codec.key.center,
        *_operands(codec.key),
        *_operands(codec.key if codec.value is None else codec.value),
        pages.view(unit_dtype(codec.layout.key)),
        pages.view(value.dtype if codec.value is None else unit_dtype(codec.value.layout)),
        pages.view(torch.float16),
        slot_mapping.contiguous(),
        rows,
        pages.shape[0] * codec.layout.page_size,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        **_key_constants(key, codec.key, config),
        **_value_constants(value, codec, config),
        VALUE_OFFSET=codec.layout.value_offset,
        KEY_SCALE_OFFSET=codec.layout.key_scale_offset,
        VALUE_SCALE_OFFSET=codec.layout.value_scale_offset,
        CHUNK_BYTES=codec.layout.chunk_bytes,
        KV_HEADS=codec.layout.kv_heads,
        PAGE_SIZE=codec.layout.page_size,
        BLOCK=config.block,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def _operands(codec: Codec) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    matrix = rotation_operand(codec.layout.head_dim, codec.layout.bits, codec.device)
    return codec.signs, matrix, codec.boundaries, codec.levels


def _key_constants(key: Tensor, codec: Codec, config: RowsConfig) -> dict[str, int | str | bool]:
    return {
        "D": codec.layout.head_dim,
        "BITS": bits_code(codec.layout),
        "INT8": codec.layout.form == "int8",
        "RULE": codec.scale_rule,
        "HAS_CENTER": codec.center is not None,
        "SPLIT": needs_split(key, codec),
        "COLUMNS": part_columns(codec.layout, config),
    }


def _value_constants(value: Tensor, codec: CacheCodec, config: RowsConfig) -> dict[str, int | str | bool]:
    layout = codec.layout.value
    return {
        "VALUE_DIM": layout.head_dim,
        "VALUE_BITS": 8 * layout.itemsize if isinstance(layout, RawLayout) else bits_code(layout),
        "VALUE_INT8": isinstance(layout, VectorLayout) and layout.form == "int8",
        "VALUE_RULE": "" if codec.value is None else codec.value.scale_rule,
        "VALUE_SPLIT": codec.value is not None and needs_split(value, codec.value),
        "VALUE_COLUMNS": part_columns(layout, config),
        "RAW": codec.value is None,
    }
