"""What the inline assembly of the byte-permute form does, in NumPy: the kernel around it then runs in the interpreter.

Written from the layout's table "A code row", not from the assembly. That the assembly does the same is for a GPU to
show (``turboquant_triton.self_test``, the conformance suite).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from numpy.typing import NDArray
from triton.runtime.interpreter import TensorHandle

from turboquant_triton.kernels import unpack_asm

Array = NDArray[Any]


def words(data: Array) -> Array:
    """Bytes ``[tokens, n]`` as little-endian words ``[tokens, n / 4, 1]``."""
    unsigned = np.ascontiguousarray(data).view(np.uint8).reshape(len(data), -1, 4).astype(np.uint32)
    return (unsigned << np.arange(0, 32, 8, dtype=np.uint32)).sum(-1, dtype=np.uint32)[..., None]


def flat(nibbles: Array) -> Array:
    """``[tokens, words, 4]`` as ``[tokens, bytes]``."""
    return nibbles.reshape(len(nibbles), -1)


def signed_bytes(code: Array, bits: int) -> Array:
    """The key byte of each code: ``q`` for the upper half, the one's complement of its mirror below."""
    q = np.array(unpack_asm.int8_levels(bits).q, dtype=np.int8)
    return np.concatenate((~q[::-1], q))[code]


def key4(data: Array) -> list[Array]:
    word, q = words(data), np.array(unpack_asm.int8_levels(4).q, dtype=np.int8)
    outputs = []
    for first_nibble, sign_bit in ((0, 7), (4, 3)):
        j = np.arange(4, dtype=np.uint32)
        magnitude = q[(word >> (4 * (first_nibble + j))) & 7]
        negative = (word >> (8 * j + np.uint32(sign_bit))) & 1
        outputs.append(flat(np.where(negative == 1, ~magnitude, magnitude)))
    return outputs


def nibble_codes(word: Array, first: int, shift: int, mask: int) -> Array:
    j = np.arange(4, dtype=np.uint32)
    return (word >> (4 * (first + j) + np.uint32(shift))) & np.uint32(mask)


def key2(data: Array) -> list[Array]:
    word = words(data)
    return [flat(signed_bytes(nibble_codes(word, first, shift, 3), 2)) for shift in (0, 2) for first in (0, 4)]


def fourth(planes: list[Array]) -> Array:
    """Nibbles whose bits are bit 3 of the nibbles of three planes."""
    ones = planes[0].dtype.type(0x11111111 & np.iinfo(planes[0].dtype).max)
    return sum(((plane >> 3) & ones) << p for p, plane in enumerate(planes))  # type: ignore[return-value]


def three_planes(front: Array, back: Array, axis: int, run: int) -> tuple[Array, Array]:
    """``front`` as it is, and ``back`` with the fourth group in the runs that were not loaded."""
    shape = list(front.shape)
    shape[axis : axis + 1] = [front.shape[axis] // (2 * run), 2, run]
    parts, third = front.reshape(shape), back.reshape(shape)
    plane = [np.take(parts, 0, axis + 1), np.take(parts, 1, axis + 1), np.take(third, 0, axis + 1)]
    return front, np.stack((plane[2], fourth(plane)), axis + 1).reshape(front.shape)


def key3(front: Array, back: Array) -> list[Array]:
    tiles = three_planes(front.view(np.uint8), back.view(np.uint8), 1, 16)
    return [flat(signed_bytes(nibble_codes(words(tile), first, 0, 7), 3)) for tile in tiles for first in (0, 4)]


def cubic(code: Array, bits: int) -> Array:
    """``h * (h * h + c)``, rounded as half-precision instructions round."""
    h = (code - np.float32(((1 << bits) - 1) / 2)).astype(np.float16)
    inner = (h.astype(np.float32) * h.astype(np.float32) + np.float32(unpack_asm.cubic_levels(bits).c)).astype(
        np.float16
    )
    return h * inner


def fields(data: Array, bits: int, stride: int) -> list[Array]:
    unsigned = data.view(np.uint16).astype(np.int32)
    return [cubic((unsigned >> shift) & ((1 << bits) - 1), bits) for shift in range(0, 16, stride)]


def value3(front: Array, back: Array) -> list[Array]:
    tiles = three_planes(front.view(np.uint16), back.view(np.uint16), 0, 8)
    return [value for tile in tiles for value in fields(tile, 3, 4)]


def log2(data: Array) -> list[Array]:
    return [np.log2(data)]


EMULATIONS = {
    unpack_asm.KEY4.value: key4,
    unpack_asm.KEY3.value: key3,
    unpack_asm.KEY2.value: key2,
    unpack_asm.VALUE4.value: lambda data: fields(data, 4, 4),
    unpack_asm.VALUE3.value: value3,
    unpack_asm.VALUE2.value: lambda data: fields(data, 2, 2),
}


def inline_asm_elementwise(asm: Any, constraints: Any, args: Any, dtype: Any, is_pure: Any, pack: Any) -> Any:
    """In place of ``triton.language.inline_asm_elementwise`` in the interpreter."""
    text = getattr(asm, "value", asm)
    emulation: Any = log2 if text.startswith("lg2") else EMULATIONS[text]
    results = emulation(*(argument.handle.data for argument in args))
    dtypes = dtype if isinstance(dtype, tuple | tl.core.tuple) else (dtype,)
    made = [
        tl.tensor(TensorHandle(np.ascontiguousarray(data), kind), tl.block_type(kind, list(data.shape)))
        for data, kind in zip(results, dtypes, strict=True)
    ]
    return tuple(made) if len(made) > 1 else made[0]
