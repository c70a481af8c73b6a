"""PTX that turns packed words into tensor-core operands without leaving registers.

Keys become int8: a byte-permute instruction looks up four codes at once, because its selectors are packed nibbles.
Values become fp16 pairs: a bit field lands in the mantissa of a constant with the right exponent, minus the middle,
then ``h * (h * h + c)``. Keys load the integer pipe and values the floating-point pipe, so that neither saturates.

The 4-bit and 2-bit forms work on single elements. The 3-bit forms combine registers of one MMA fragment: they rely on
the register order of Triton's dot operands, which :mod:`turboquant_triton.self_test` checks on the device.
"""

from __future__ import annotations

import numpy as np
import triton
import triton.language as tl

from turboquant_core.codebook.formats import CubicLevels, Int8Levels, format_constants

# Mantissa position of a field and the power of two whose unit in the last place gives it weight one.
_FIELD_POSITIONS = {2: (1, 3, 5, 7), 3: (1, 5), 4: (1, 5)}


def int8_levels(bits: int) -> Int8Levels:
    """Constants of the key codebook of ``bits``."""
    constants = format_constants("int8", bits)
    assert isinstance(constants, Int8Levels)
    return constants


def cubic_levels(bits: int) -> CubicLevels:
    """Constants of the value codebook of ``bits``."""
    constants = format_constants("cubic", bits)
    assert isinstance(constants, CubicLevels)
    return constants


def _word(values: list[int]) -> str:
    return f"0x{sum((value & 255) << (8 * i) for i, value in enumerate(values)):08x}"


def _half2(value: float) -> str:
    half = np.float16(value)
    if float(half) != value:
        raise ValueError(f"{value} is not an fp16 number")
    bits = int(half.view(np.uint16))
    return f"0x{bits:04x}{bits:04x}"


def _signed_lookup(bits: int) -> tuple[str, str]:
    """The table of ``2**bits`` signed levels as two permute operands."""
    q = list(int8_levels(bits).q)
    table = [~value for value in reversed(q)] + q
    return _word(table[:4]), _word(table[4:])


def _magnitude_lookup() -> tuple[str, str]:
    """The table of the eight magnitudes of 4-bit levels as two permute operands."""
    q = list(int8_levels(4).q)
    return _word(q[:4]), _word(q[4:])


def _key4(low: str, high: str) -> str:
    return f"""{{
    .reg .b32 m, n, a, b, s;
    and.b32 m, $2, 0x77777777;
    shr.u32 n, m, 16;
    prmt.b32 a, {low}, {high}, m;
    prmt.b32 b, {low}, {high}, n;
    prmt.b32 s, $2, 0, 0xba98;
    xor.b32 $0, a, s;
    shl.b32 n, $2, 4;
    prmt.b32 s, n, 0, 0xba98;
    xor.b32 $1, b, s;
    }}"""


def _key2(table: str) -> str:
    zero = 0
    return f"""{{
    .reg .b32 m, n;
    and.b32 m, $4, 0x33333333;
    prmt.b32 $0, {table}, {zero}, m;
    shr.u32 n, m, 16;
    prmt.b32 $1, {table}, {zero}, n;
    shr.u32 m, $4, 2;
    and.b32 m, m, 0x33333333;
    prmt.b32 $2, {table}, {zero}, m;
    shr.u32 n, m, 16;
    prmt.b32 $3, {table}, {zero}, n;
    }}"""


def _fourth_group(planes: tuple[str, str, str], target: str) -> str:
    """Nibbles whose low three bits are bit 3 of the nibbles of the three planes."""
    first, second, third = planes
    return f"""
    shr.u32 {target}, {first}, 3;
    and.b32 {target}, {target}, 0x11111111;
    shr.u32 t, {second}, 2;
    and.b32 t, t, 0x22222222;
    or.b32 {target}, {target}, t;
    shr.u32 t, {third}, 1;
    and.b32 t, t, 0x44444444;
    or.b32 {target}, {target}, t;"""


def _key3(low: str, high: str) -> str:
    """Fragments of two tiles: planes 0 and 1 in ``$16..$19``, plane 2 and padding in ``$20..$23``.

    Registers 0 and 1 of a fragment are rows g and g + 8 of k 0..15, registers 2 and 3 those of k 16..31.
    """
    table = f"{low}, {high}"
    body = ""
    for row in (0, 1):
        planes = (f"${16 + row}", f"${18 + row}", f"${20 + row}")
        body += _fourth_group(planes, "g")
        for source, k in zip((*planes, "g"), (0, 2, 0, 2), strict=True):
            first = (0 if source in planes[:2] else 8) + k + row
            body += f"""
    and.b32 m, {source}, 0x77777777;
    prmt.b32 ${first}, {table}, m;
    shr.u32 m, m, 16;
    prmt.b32 ${first + 4}, {table}, m;"""
    return f"{{\n    .reg .b32 g, m, t;{body}\n    }}"


def _fields(source: str, outputs: list[str], bits: int) -> str:
    """Fields of the low half (``source << 1``) or the high half (``source >> 7``) of each 16-bit word as fp16."""
    middle = ((1 << bits) - 1) / 2
    text = ""
    for output, position in zip(outputs, _FIELD_POSITIONS[bits], strict=True):
        base = 2.0 ** (10 - position)
        mask = ((1 << bits) - 1) << position
        text += f"""
    lop3.b32 {output}, {source}, 0x{mask:04x}{mask:04x}, {_half2(base)}, 0xea;
    mov.b32 k, {_half2(-(base + middle))};
    add.f16x2 {output}, {output}, k;"""
    return text


def _cubic(outputs: list[str], bits: int) -> str:
    text = f"\n    mov.b32 k, {_half2(cubic_levels(bits).c)};"
    for output in outputs:
        text += f"\n    fma.rn.f16x2 t, {output}, {output}, k;\n    mul.f16x2 {output}, {output}, t;"
    return text


def _value(word: str, outputs: list[str], bits: int) -> str:
    """All fields of one register (two tokens of one 16-bit word), least significant first, as cubic levels."""
    half = len(outputs) // 2
    return (
        f"\n    shl.b32 x, {word}, 1;{_fields('x', outputs[:half], bits)}"
        f"\n    shr.u32 x, {word}, 7;{_fields('x', outputs[half:], bits)}{_cubic(outputs, bits)}"
    )


def _value_faithful(bits: int) -> str:
    fields = 16 // bits
    outputs = [f"${i}" for i in range(fields)]
    return f"{{\n    .reg .b32 k, t, x;{_value(f'${fields}', outputs, bits)}\n    }}"


def _value3() -> str:
    """Fragments of two tiles: planes 0 and 1 in ``$16`` and ``$17`` (rows g and g + 8), plane 2 in ``$18``.

    Output ``2 j + row`` (``8 + 2 j + row``) is nibble ``j`` of the first (second) tile.
    """
    planes = ("$16", "$17", "$18")
    body = _fourth_group(planes, "g")
    for source, first in zip((*planes, "g"), (0, 1, 8, 9), strict=True):
        body += _value(source, [f"${first + 2 * j}" for j in range(4)], 3)
    return f"{{\n    .reg .b32 g, k, t, x;{body}\n    }}"


def _in_registers(low: str, high: str) -> str:
    """Assembly that gives a table in two registers.

    A lane's masks of lower and of higher lanes have no bit in common. The assembler does not know that: it keeps the
    table instead of moving constants into registers at every look-up.
    """
    return f"""{{
    .reg .b32 t, s;
    mov.u32 t, %lanemask_lt;
    mov.u32 s, %lanemask_ge;
    and.b32 t, t, s;
    or.b32 $0, t, {low};
    or.b32 $1, t, {high};
    }}"""


def _constraints(outputs: int, inputs: int) -> str:
    return ",".join(["=&r"] * outputs + ["r"] * inputs)


KEY4 = tl.constexpr(_key4(*_magnitude_lookup()))
KEY4_CONSTRAINTS = tl.constexpr(_constraints(2, 1))
KEY3 = tl.constexpr(_key3(*_signed_lookup(3)))
KEY3_CONSTRAINTS = tl.constexpr(_constraints(16, 8))
KEY2 = tl.constexpr(_key2(_signed_lookup(2)[0]))
KEY2_CONSTRAINTS = tl.constexpr(_constraints(4, 1))
VALUE4 = tl.constexpr(_value_faithful(4))
VALUE4_CONSTRAINTS = tl.constexpr(_constraints(4, 1))
VALUE3 = tl.constexpr(_value3())
VALUE3_CONSTRAINTS = tl.constexpr(_constraints(16, 4))
VALUE2 = tl.constexpr(_value_faithful(2))
VALUE2_CONSTRAINTS = tl.constexpr(_constraints(8, 1))

# The same with the tables as further operands; a 32-bit operand is listed once for each packed element.
KEY4_TABLES = tl.constexpr(_key4("$3", "$7"))
KEY4_TABLES_CONSTRAINTS = tl.constexpr(_constraints(2, 1 + 2 * 4))
KEY3_TABLES = tl.constexpr(_key3("$24", "$40"))
KEY3_TABLES_CONSTRAINTS = tl.constexpr(_constraints(16, 8 + 2 * 16))
KEY2_TABLES = tl.constexpr(_key2("$5"))
KEY2_TABLES_CONSTRAINTS = tl.constexpr(_constraints(4, 1 + 4))
TABLES4 = tl.constexpr(_in_registers(*_magnitude_lookup()))
TABLES3 = tl.constexpr(_in_registers(*_signed_lookup(3)))
TABLES2 = tl.constexpr(_in_registers(*_signed_lookup(2)))

# Step of the second of two codebooks in steps of the first (kernels.widths).
KEY_STEP_RATIO_302 = tl.constexpr(int8_levels(2).step / int8_levels(3).step)
KEY_STEP_RATIO_403 = tl.constexpr(int8_levels(3).step / int8_levels(4).step)
VALUE_STEP_RATIO_302 = tl.constexpr(cubic_levels(2).step / cubic_levels(3).step)
VALUE_STEP_RATIO_403 = tl.constexpr(cubic_levels(3).step / cubic_levels(4).step)


@triton.constexpr_function
def key_step_ratio(bits):
    """Step of the second half's key codebook in steps of the first half's."""
    return KEY_STEP_RATIO_302 if bits == 302 else KEY_STEP_RATIO_403


@triton.constexpr_function
def value_step_ratio(bits):
    """The same of value codebooks."""
    return VALUE_STEP_RATIO_302 if bits == 302 else VALUE_STEP_RATIO_403
