"""Products with packed keys and values for one warp; :mod:`turboquant_triton.kernels.attend_operands` in Gluon."""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from .unpack_asm import (
    KEY2_TABLES,
    KEY2_TABLES_CONSTRAINTS,
    KEY3_TABLES,
    KEY3_TABLES_CONSTRAINTS,
    KEY4_TABLES,
    KEY4_TABLES_CONSTRAINTS,
    TABLES2,
    TABLES3,
    TABLES4,
    VALUE2,
    VALUE2_CONSTRAINTS,
    VALUE3,
    VALUE3_CONSTRAINTS,
    VALUE4,
    VALUE4_CONSTRAINTS,
)
from .warp_layouts import PRODUCT

KEY_OPERAND = tl.constexpr(gl.DotOperandLayout(0, PRODUCT.value, 4))
QUERY_OPERAND = tl.constexpr(gl.DotOperandLayout(1, PRODUCT.value, 4))
VALUE_OPERAND = tl.constexpr(gl.DotOperandLayout(0, PRODUCT.value, 2))
WEIGHT_OPERAND = tl.constexpr(gl.DotOperandLayout(1, PRODUCT.value, 2))
TRANSPOSE = tl.constexpr("movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;")


@gluon.jit
def query_tile(q, coordinate, N: gl.constexpr, D: gl.constexpr):
    """int8 ``[len(coordinate), N]``: rows of the rotated query in the order in which keys are unpacked."""
    n = gl.arange(0, N, layout=gl.SliceLayout(0, QUERY_OPERAND))
    return gl.load(q + n[None, :] * D + coordinate[:, None])


@gluon.jit
def query_tiles(q, BITS: gl.constexpr, N: gl.constexpr, D: gl.constexpr):
    """The query tiles that :func:`key_product` multiplies with, for one int8 ``[N, D]`` query block at ``q``."""
    ROWS: gl.constexpr = gl.SliceLayout(1, QUERY_OPERAND)
    if BITS == 3:
        column = gl.arange(0, D // 4, layout=ROWS)
        byte = (column // 32) * 16 + column % 16
        front = ((column % 32) // 16) * (D // 4) + 8 * (byte // 4) + byte % 4
        back = front + D // 2
        return (
            query_tile(q, front, N, D), query_tile(q, front + 4, N, D),
            query_tile(q, back, N, D), query_tile(q, back + 4, N, D),
        )  # fmt: skip
    else:
        byte = gl.arange(0, D * BITS // 8, layout=ROWS)
        low = 8 * (byte // 4) + byte % 4
        if BITS == 4:
            return query_tile(q, low, N, D), query_tile(q, low + 4, N, D)
        else:
            return (
                query_tile(q, low, N, D), query_tile(q, low + 4, N, D),
                query_tile(q, low + D // 2, N, D), query_tile(q, low + 4 + D // 2, N, D),
            )  # fmt: skip


@gluon.jit
def lookup_tables(BITS: gl.constexpr):
    """The lookup tables of keys in two registers."""
    TEXT: gl.constexpr = TABLES4 if BITS == 4 else TABLES3 if BITS == 3 else TABLES2
    return gl.inline_asm_elementwise(TEXT, "=r,=r", [], dtype=(gl.int32, gl.int32), is_pure=False, pack=1)


@gluon.jit
def key_product(front, back, query, tables, start, BITS: gl.constexpr):
    """``start`` plus int32 ``[BLOCK, N]`` products of the key bytes of the shared tiles with the query."""
    word = front.load(KEY_OPERAND)
    low = gl.full(word.shape, tables[0], gl.int32, layout=KEY_OPERAND)
    high = gl.full(word.shape, tables[1], gl.int32, layout=KEY_OPERAND)
    if BITS == 4:
        a, b = gl.inline_asm_elementwise(
            KEY4_TABLES, KEY4_TABLES_CONSTRAINTS, [word, low, high], dtype=(gl.int8,) * 2, is_pure=True, pack=4
        )
        return mma_v2(b, query[1], mma_v2(a, query[0], start))
    else:
        if BITS == 3:
            words = [word, back.load(KEY_OPERAND), low, high]
            a, b, c, d = gl.inline_asm_elementwise(
                KEY3_TABLES, KEY3_TABLES_CONSTRAINTS, words, dtype=(gl.int8,) * 4, is_pure=True, pack=16
            )
        else:
            a, b, c, d = gl.inline_asm_elementwise(
                KEY2_TABLES, KEY2_TABLES_CONSTRAINTS, [word, low], dtype=(gl.int8,) * 4, is_pure=True, pack=4
            )
        first = mma_v2(b, query[1], mma_v2(a, query[0], start))
        return mma_v2(d, query[3], mma_v2(c, query[2], first))


@gluon.jit
def weight_operand(weight, BLOCK: gl.constexpr, N: gl.constexpr):
    """Weights fp16 ``[BLOCK, N]`` as the operand of the value product: each block of 8 x 8 is turned in registers."""
    turned = gl.inline_asm_elementwise(TRANSPOSE, "=r,r", [weight], dtype=gl.float16, is_pure=True, pack=2)
    turned = gl.permute(gl.reshape(turned, [BLOCK // 8, 8, N // 8, 8]), (0, 3, 2, 1))
    return gl.convert_layout(gl.reshape(turned, [BLOCK, N]), WEIGHT_OPERAND, assert_trivial=True)


@gluon.jit
def zero_output(BITS: gl.constexpr, N: gl.constexpr, D: gl.constexpr):
    """Accumulators float32 ``[rows, N]``, one for each unpacked value operand."""
    if BITS == 4:
        zero = gl.zeros([D // 4, N], gl.float32, layout=PRODUCT)
        return zero, zero, zero, zero
    else:
        zero = gl.zeros([D // 8, N], gl.float32, layout=PRODUCT)
        return zero, zero, zero, zero, zero, zero, zero, zero


@gluon.jit
def add_values(output, front, back, weight, decay, BITS: gl.constexpr):
    """``output * decay + V^T weight`` for the codes of the shared tiles."""
    word = front.permute((1, 0)).load(VALUE_OPERAND)
    if BITS == 4:
        v = gl.inline_asm_elementwise(VALUE4, VALUE4_CONSTRAINTS, [word], dtype=(gl.float16,) * 4, is_pure=True, pack=2)
        return (
            mma_v2(v[0], weight, output[0] * decay), mma_v2(v[1], weight, output[1] * decay),
            mma_v2(v[2], weight, output[2] * decay), mma_v2(v[3], weight, output[3] * decay),
        )  # fmt: skip
    else:
        if BITS == 3:
            words = [word, back.permute((1, 0)).load(VALUE_OPERAND)]
            v = gl.inline_asm_elementwise(
                VALUE3, VALUE3_CONSTRAINTS, words, dtype=(gl.float16,) * 8, is_pure=True, pack=4
            )
        else:
            v = gl.inline_asm_elementwise(
                VALUE2, VALUE2_CONSTRAINTS, [word], dtype=(gl.float16,) * 8, is_pure=True, pack=2
            )
        return (
            mma_v2(v[0], weight, output[0] * decay), mma_v2(v[1], weight, output[1] * decay),
            mma_v2(v[2], weight, output[2] * decay), mma_v2(v[3], weight, output[3] * decay),
            mma_v2(v[4], weight, output[4] * decay), mma_v2(v[5], weight, output[5] * decay),
            mma_v2(v[6], weight, output[6] * decay), mma_v2(v[7], weight, output[7] * decay),
        )  # fmt: skip


@gluon.jit
def store_output(target, output, factor, BITS: gl.constexpr, N: gl.constexpr, D: gl.constexpr):
    """Write the accumulators times ``factor`` in coordinate order: float32 ``[N, D]`` at ``target``."""
    n = gl.arange(0, N, layout=gl.SliceLayout(0, PRODUCT))[None, :] * D
    LINES: gl.constexpr = D // 4 if BITS == 4 else D // 8
    line = gl.arange(0, LINES, layout=gl.SliceLayout(1, PRODUCT))[:, None]
    if BITS == 4:
        for j in gl.static_range(4):
            gl.store(target + n + 4 * line + j, output[j] * factor)
    elif BITS == 3:
        front = target + n + ((line % 16) // 8) * (D // 4) + 4 * ((line // 16) * 8 + line % 8)
        for j in gl.static_range(4):
            gl.store(front + j, output[j] * factor)
            gl.store(front + D // 2 + j, output[4 + j] * factor)
    else:
        for j in gl.static_range(4):
            gl.store(target + n + 4 * line + j, output[2 * j] * factor)
            gl.store(target + n + D // 2 + 4 * line + j, output[2 * j + 1] * factor)
