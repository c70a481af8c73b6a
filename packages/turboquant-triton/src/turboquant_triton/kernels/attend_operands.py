"""Packed keys and values as tensor-core operands, and the products with them: device functions, one per width.

Tokens are rows of the key product and columns of the value product, so that a packed tile is loaded once in the layout
of the operand and unpacked in registers (:mod:`turboquant_triton.kernels.unpack_asm`); query heads are the short side.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .unpack_asm import (
    KEY2,
    KEY2_CONSTRAINTS,
    KEY3,
    KEY3_CONSTRAINTS,
    KEY4,
    KEY4_CONSTRAINTS,
    VALUE2,
    VALUE2_CONSTRAINTS,
    VALUE3,
    VALUE3_CONSTRAINTS,
    VALUE4,
    VALUE4_CONSTRAINTS,
    key_step_ratio,
    value_step_ratio,
)
from .widths import first_width, is_mixed, row_bytes, second_width


@triton.jit
def padded(size: tl.constexpr, least: tl.constexpr) -> tl.constexpr:
    """Smallest power of two that holds ``size`` and ``least``."""
    power: tl.constexpr = triton.next_power_of_2(size)
    return power if power > least else least


@triton.jit
def load_query(q, coordinate, valid, N: tl.constexpr, STRIDE: tl.constexpr):
    """int8 ``[len(coordinate), N]``: rows of the rotated query in the order in which keys are unpacked."""
    n = tl.arange(0, N)
    return tl.load(q + n[None, :] * STRIDE + coordinate[:, None], mask=valid[:, None], other=0)


@triton.jit
def query_operands(q, BITS: tl.constexpr, N: tl.constexpr, D: tl.constexpr):
    """The query tiles that :func:`key_scores` multiplies with, for one int8 ``[N, D]`` query block at ``q``."""
    if is_mixed(BITS):
        first = query_part(q, first_width(BITS), N, D // 2, D)
        return first, query_part(q + D // 2, second_width(BITS), N, D // 2, D)
    else:
        return query_part(q, BITS, N, D, D)


@triton.jit
def query_part(q, BITS: tl.constexpr, N: tl.constexpr, D: tl.constexpr, STRIDE: tl.constexpr):
    """The tiles of ``D`` coordinates from ``q`` on that keys have in one width; vectors lie ``STRIDE`` apart."""
    if BITS == 4:
        BYTES4: tl.constexpr = triton.next_power_of_2(max(D // 2, 32))
        byte4 = tl.arange(0, BYTES4)
        low4 = 8 * (byte4 // 4) + byte4 % 4
        return (
            load_query(q, low4, low4 < D, N, STRIDE),
            load_query(q, low4 + 4, low4 + 4 < D, N, STRIDE),
        )
    elif BITS == 3:
        column = tl.arange(0, 2 * triton.next_power_of_2(max(D // 8, 16)))
        byte3 = (column // 32) * 16 + column % 16
        second = (column % 32) // 16
        low3 = 8 * (byte3 // 4) + byte3 % 4
        first_group = second * (D // 4) + low3
        last_group = first_group + D // 2
        return (
            load_query(q, first_group, low3 < D // 4, N, STRIDE),
            load_query(q, first_group + 4, low3 + 4 < D // 4, N, STRIDE),
            load_query(q, last_group, low3 < D // 4, N, STRIDE),
            load_query(q, last_group + 4, low3 + 4 < D // 4, N, STRIDE),
        )
    else:
        byte2 = tl.arange(0, triton.next_power_of_2(max(D // 4, 32)))
        low2 = 8 * (byte2 // 4) + byte2 % 4
        return (
            load_query(q, low2, low2 < D // 2, N, STRIDE),
            load_query(q, low2 + 4, low2 + 4 < D // 2, N, STRIDE),
            load_query(q, low2 + D // 2, low2 < D // 2, N, STRIDE),
            load_query(q, low2 + 4 + D // 2, low2 + 4 < D // 2, N, STRIDE),
        )


@triton.jit
def load_columns(row, column, valid, FULL: tl.constexpr):
    """Tile ``[tokens, columns]`` at per-token pointers; columns that are not ``valid`` read as zero."""
    if FULL:
        return tl.load(row[:, None] + column[None, :])
    else:
        return tl.load(row[:, None] + column[None, :], mask=valid[None, :], other=0)


@triton.jit
def plane_offset(column, plane, PLANE: tl.constexpr, RUN: tl.constexpr):
    """Where in a 3-bit row a tile reads ``column``, when runs of ``RUN`` entries of two planes take turns.

    The hints say what the compiler does not see behind divisions and remainders; without them, planes of more than one
    run are loaded entry by entry, and the loop is not pipelined.
    """
    offset = plane * PLANE + (column // (2 * RUN)) * RUN + column % RUN
    return tl.multiple_of(tl.max_contiguous(offset, RUN), min(PLANE & -PLANE, RUN))


@triton.jit
def plane_mask(column, PLANE: tl.constexpr, RUN: tl.constexpr):
    """Columns of :func:`plane_offset` that lie in their plane."""
    inside = (column // (2 * RUN)) * RUN + column % RUN
    return tl.max_constancy(inside < PLANE, min(PLANE & -PLANE, RUN))


@triton.jit
def first_of_two(column, PLANE: tl.constexpr, RUN: tl.constexpr):
    """Columns of the first of the two planes that take turns; those of the other are made in registers."""
    inside = (column // (2 * RUN)) * RUN + column % RUN
    first = (inside < PLANE) & ((column % (2 * RUN)) // RUN == 0)
    return tl.max_constancy(first, min(PLANE & -PLANE, RUN))


@triton.jit
def key_product(row, query, BITS: tl.constexpr, D: tl.constexpr):
    """int32 ``[tokens, N]``: ``sum_i key_byte_i * query_i`` for the code rows at ``row`` (pointers to int8)."""
    if BITS == 4:
        BYTES4: tl.constexpr = triton.next_power_of_2(max(D // 2, 32))
        byte4 = tl.arange(0, BYTES4)
        word4 = load_columns(row, byte4, byte4 < D // 2, BYTES4 == D // 2)
        low4, high4 = tl.inline_asm_elementwise(
            KEY4, KEY4_CONSTRAINTS, [word4], dtype=(tl.int8, tl.int8), is_pure=True, pack=4
        )
        score = tl.dot(low4, query[0], out_dtype=tl.int32)
        return tl.dot(high4, query[1], score, out_dtype=tl.int32)
    elif BITS == 3:
        PLANE: tl.constexpr = D // 8
        column = tl.arange(0, 2 * triton.next_power_of_2(max(PLANE, 16)))
        second = (column % 32) // 16
        FULL3: tl.constexpr = triton.next_power_of_2(max(PLANE, 16)) == PLANE
        front = load_columns(row, plane_offset(column, second, PLANE, 16), plane_mask(column, PLANE, 16), FULL3)
        back = load_columns(row, plane_offset(column, 2, PLANE, 16), first_of_two(column, PLANE, 16), False)
        low_f, high_f, low_b, high_b = tl.inline_asm_elementwise(
            KEY3, KEY3_CONSTRAINTS, [front, back], dtype=(tl.int8, tl.int8, tl.int8, tl.int8), is_pure=True, pack=16
        )
        score = tl.dot(low_f, query[0], out_dtype=tl.int32)
        score = tl.dot(high_f, query[1], score, out_dtype=tl.int32)
        score = tl.dot(low_b, query[2], score, out_dtype=tl.int32)
        return tl.dot(high_b, query[3], score, out_dtype=tl.int32)
    else:
        BYTES2: tl.constexpr = triton.next_power_of_2(max(D // 4, 32))
        byte2 = tl.arange(0, BYTES2)
        word2 = load_columns(row, byte2, byte2 < D // 4, BYTES2 == D // 4)
        a, b, c, d = tl.inline_asm_elementwise(
            KEY2, KEY2_CONSTRAINTS, [word2], dtype=(tl.int8, tl.int8, tl.int8, tl.int8), is_pure=True, pack=4
        )
        score = tl.dot(a, query[0], out_dtype=tl.int32)
        score = tl.dot(b, query[1], score, out_dtype=tl.int32)
        score = tl.dot(c, query[2], score, out_dtype=tl.int32)
        return tl.dot(d, query[3], score, out_dtype=tl.int32)


@triton.jit
def key_scores(row, query, BITS: tl.constexpr, D: tl.constexpr):
    """float32 ``[tokens, N]``: :func:`key_product`, with two widths of both halves in steps of the first."""
    if is_mixed(BITS):
        FIRST: tl.constexpr = first_width(BITS)
        first = key_product(row, query[0], FIRST, D // 2).to(tl.float32)
        second = key_product(row + row_bytes(D // 2, FIRST), query[1], second_width(BITS), D // 2).to(tl.float32)
        return first + second * key_step_ratio(BITS)
    else:
        return key_product(row, query, BITS, D).to(tl.float32)


@triton.jit
def zero_output(BITS: tl.constexpr, N: tl.constexpr, D: tl.constexpr):
    """Accumulators float32 ``[rows, N]``, one for each unpacked value operand, those of two widths together."""
    if is_mixed(BITS):
        return zero_part(first_width(BITS), N, D // 2) + zero_part(second_width(BITS), N, D // 2)
    else:
        return zero_part(BITS, N, D)


@triton.jit
def zero_part(BITS: tl.constexpr, N: tl.constexpr, D: tl.constexpr):
    """:func:`zero_output` for one width."""
    if BITS == 16:
        return (tl.zeros((triton.next_power_of_2(D), N), tl.float32),)
    elif BITS == 4:
        zero4 = tl.zeros((triton.next_power_of_2(max(D // 4, 16)), N), tl.float32)
        return (zero4, zero4, zero4, zero4)
    elif BITS == 3:
        zero3 = tl.zeros((2 * triton.next_power_of_2(max(D // 16, 8)), N), tl.float32)
        return (zero3, zero3, zero3, zero3, zero3, zero3, zero3, zero3)
    else:
        zero2 = tl.zeros((triton.next_power_of_2(max(D // 8, 16)), N), tl.float32)
        return (zero2, zero2, zero2, zero2, zero2, zero2, zero2, zero2)


@triton.jit
def load_rows(row, line, valid, FULL: tl.constexpr):
    """Tile ``[lines, tokens]`` at per-token pointers: the transposed view, as the value operand needs it."""
    if FULL:
        return tl.load(row[None, :] + line[:, None])
    else:
        return tl.load(row[None, :] + line[:, None], mask=valid[:, None], other=0)


@triton.jit
def first_outputs(output, BITS: tl.constexpr):
    """Accumulators of the first of two widths."""
    if first_width(BITS) == 4:
        return output[0], output[1], output[2], output[3]
    else:
        return output[0], output[1], output[2], output[3], output[4], output[5], output[6], output[7]


@triton.jit
def second_outputs(output, BITS: tl.constexpr):
    """Accumulators of the second of two widths, which is 2 or 3."""
    B: tl.constexpr = 4 if first_width(BITS) == 4 else 8
    return (
        output[B], output[B + 1], output[B + 2], output[B + 3],
        output[B + 4], output[B + 5], output[B + 6], output[B + 7],
    )  # fmt: skip


@triton.jit
def add_values(output, row, seen, weight, decay, BITS: tl.constexpr, D: tl.constexpr):
    """:func:`add_part`, with two widths for both halves."""
    if is_mixed(BITS):
        FIRST: tl.constexpr = first_width(BITS)
        first = add_part(first_outputs(output, BITS), row, seen, weight, decay, FIRST, D // 2)
        second_row = row + row_bytes(D // 2, FIRST) // 2
        second = second_outputs(output, BITS)
        return first + add_part(second, second_row, seen, weight, decay, second_width(BITS), D // 2)
    else:
        return add_part(output, row, seen, weight, decay, BITS, D)


@triton.jit
def add_part(output, row, seen, weight, decay, BITS: tl.constexpr, D: tl.constexpr):
    """``output * decay + V^T weight`` for the code rows at ``row`` (int16 pointers; raw: the values' type).

    Codes are finite whatever the bytes; a raw value that is not ``seen`` may be NaN and reads as zero.
    """
    if BITS == 16:
        LINES: tl.constexpr = triton.next_power_of_2(D)
        line = tl.arange(0, LINES)
        value = tl.load(row[None, :] + line[:, None], mask=seen[None, :] & (line < D)[:, None], other=0.0)
        return (tl.dot(value, weight.to(value.dtype), output[0] * decay),)
    elif BITS == 4:
        WORDS4: tl.constexpr = triton.next_power_of_2(max(D // 4, 16))
        word4 = tl.arange(0, WORDS4)
        packed4 = load_rows(row, word4, word4 < D // 4, WORDS4 == D // 4)
        v0, v1, v2, v3 = tl.inline_asm_elementwise(
            VALUE4, VALUE4_CONSTRAINTS, [packed4], dtype=(tl.float16,) * 4, is_pure=True, pack=2
        )
        return (
            tl.dot(v0, weight, output[0] * decay),
            tl.dot(v1, weight, output[1] * decay),
            tl.dot(v2, weight, output[2] * decay),
            tl.dot(v3, weight, output[3] * decay),
        )
    elif BITS == 3:
        PLANE: tl.constexpr = D // 16
        LINES3: tl.constexpr = 2 * triton.next_power_of_2(max(PLANE, 8))
        line3 = tl.arange(0, LINES3)
        second = (line3 % 16) // 8
        FULL3: tl.constexpr = LINES3 == 2 * PLANE
        front = load_rows(row, plane_offset(line3, second, PLANE, 8), plane_mask(line3, PLANE, 8), FULL3)
        back = load_rows(row, plane_offset(line3, 2, PLANE, 8), first_of_two(line3, PLANE, 8), False)
        f0, f1, f2, f3, b0, b1, b2, b3 = tl.inline_asm_elementwise(
            VALUE3, VALUE3_CONSTRAINTS, [front, back], dtype=(tl.float16,) * 8, is_pure=True, pack=4
        )
        return (
            tl.dot(f0, weight, output[0] * decay),
            tl.dot(f1, weight, output[1] * decay),
            tl.dot(f2, weight, output[2] * decay),
            tl.dot(f3, weight, output[3] * decay),
            tl.dot(b0, weight, output[4] * decay),
            tl.dot(b1, weight, output[5] * decay),
            tl.dot(b2, weight, output[6] * decay),
            tl.dot(b3, weight, output[7] * decay),
        )
    else:
        WORDS2: tl.constexpr = triton.next_power_of_2(max(D // 8, 16))
        word2 = tl.arange(0, WORDS2)
        packed2 = load_rows(row, word2, word2 < D // 8, WORDS2 == D // 8)
        w0, w1, w2, w3, w4, w5, w6, w7 = tl.inline_asm_elementwise(
            VALUE2, VALUE2_CONSTRAINTS, [packed2], dtype=(tl.float16,) * 8, is_pure=True, pack=2
        )
        return (
            tl.dot(w0, weight, output[0] * decay),
            tl.dot(w1, weight, output[1] * decay),
            tl.dot(w2, weight, output[2] * decay),
            tl.dot(w3, weight, output[3] * decay),
            tl.dot(w4, weight, output[4] * decay),
            tl.dot(w5, weight, output[5] * decay),
            tl.dot(w6, weight, output[6] * decay),
            tl.dot(w7, weight, output[7] * decay),
        )


@triton.jit
def store_output(target, output, BITS: tl.constexpr, N: tl.constexpr, D: tl.constexpr):
    """Write the accumulators in coordinate order: float32 ``[N, D]`` at ``target``, in steps of the first width."""
    if is_mixed(BITS):
        store_part(target, first_outputs(output, BITS), 1.0, first_width(BITS), N, D // 2, D)
        ratio = value_step_ratio(BITS)
        store_part(target + D // 2, second_outputs(output, BITS), ratio, second_width(BITS), N, D // 2, D)
    else:
        store_part(target, output, 1.0, BITS, N, D, D)


@triton.jit
def store_part(target, output, factor, BITS: tl.constexpr, N: tl.constexpr, D: tl.constexpr, STRIDE: tl.constexpr):
    """:func:`store_output` for one width, times ``factor``; vectors lie ``STRIDE`` apart."""
    n = tl.arange(0, N)[None, :] * STRIDE
    if BITS == 16:
        line = tl.arange(0, triton.next_power_of_2(D))[:, None]
        tl.store(target + n + line, output[0] * factor, mask=line < D)
    elif BITS == 4:
        word4 = tl.arange(0, triton.next_power_of_2(max(D // 4, 16)))[:, None]
        for j in tl.static_range(4):
            tl.store(target + n + 4 * word4 + j, output[j] * factor, mask=word4 < D // 4)
    elif BITS == 3:
        PLANE: tl.constexpr = D // 16
        line3 = tl.arange(0, 2 * triton.next_power_of_2(max(PLANE, 8)))[:, None]
        word3 = (line3 // 16) * 8 + line3 % 8
        group = (line3 % 16) // 8
        for j in tl.static_range(4):
            front = target + n + group * (D // 4) + 4 * word3 + j
            tl.store(front, output[j] * factor, mask=word3 < PLANE)
            tl.store(front + D // 2, output[4 + j] * factor, mask=word3 < PLANE)
    else:
        word2 = tl.arange(0, triton.next_power_of_2(max(D // 8, 16)))[:, None]
        for j in tl.static_range(4):
            tl.store(target + n + 4 * word2 + j, output[2 * j] * factor, mask=word2 < D // 8)
            tl.store(target + n + D // 2 + 4 * word2 + j, output[2 * j + 1] * factor, mask=word2 < D // 8)
