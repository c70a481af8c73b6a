"""The bit order, stated a second time from docs/layout.md and compared bit by bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from turboquant_core import VectorLayout, pack_codes, unpack_codes
from turboquant_core.layout import WIDTHS

LAYOUTS = [VectorLayout(d, b, f) for d in (8, 64, 80, 96, 120) for b in WIDTHS for f in ("int8", "cubic")]
LAYOUTS += [VectorLayout(d, b, f) for d in (16, 64, 112, 128) for b in (2.5, 3.5) for f in ("int8", "cubic")]


def random_codes(layout: VectorLayout, lead: tuple[int, ...], seed: int) -> torch.Tensor:
    """Codes of each coordinate's own width, ``[*lead, head_dim]``."""
    generator = torch.Generator().manual_seed(seed)
    halves = [
        torch.randint(0, 1 << part.width, (*lead, part.head_dim), dtype=torch.uint8, generator=generator)
        for part in layout.parts
    ]
    return torch.cat(halves, dim=-1)


def row_bits(codes: list[int], layout: VectorLayout) -> list[int]:
    """The row as bits, from the words of docs/layout.md, one coordinate at a time."""
    if layout.bits in (2.5, 3.5):
        half, wide = layout.head_dim // 2, int(layout.bits) + 1
        first = row_bits(codes[:half], VectorLayout(half, wide, layout.form))
        return first + row_bits(codes[half:], VectorLayout(half, wide - 1, layout.form))
    d, bits = layout.head_dim, [0] * (layout.code_bytes * 8)

    def put(value: int, width: int, at: int) -> None:
        for k in range(width):
            bits[at + k] = (value >> k) & 1

    for i, code in enumerate(codes):
        if layout.bits == 2:
            put(code, 2, 4 * (i % (d // 2)) + (2 if i >= d // 2 else 0))
        elif layout.bits == 3 and i < 3 * d // 4:
            put(code, 3, 4 * i)
        elif layout.bits == 3:
            for plane in range(3):
                put(code >> plane, 1, 4 * (plane * d // 4 + i - 3 * d // 4) + 3)
        elif layout.form == "cubic":
            put(code, 4, 4 * i)
        else:
            word, j = 32 * (i // 8), i % 8
            put(code - 8 if code >= 8 else 7 - code, 3, word + 4 * j)
            put(int(code < 8), 1, word + (8 * j + 7 if j < 4 else 8 * (j - 4) + 3))
    return bits


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_bit_is_where_the_layout_says(layout: VectorLayout) -> None:
    codes = random_codes(layout, (), 0)
    row = pack_codes(codes, layout)
    bits = [(int(row[k // 8]) >> (k % 8)) & 1 for k in range(8 * layout.code_bytes)]
    assert bits == row_bits(codes.tolist(), layout)


@settings(deadline=None)
@given(layout=st.sampled_from(LAYOUTS), lead=st.lists(st.integers(0, 3), max_size=3), seed=st.integers(0, 2**31))
def test_unpack_inverts_pack(layout: VectorLayout, lead: list[int], seed: int) -> None:
    codes = random_codes(layout, tuple(lead), seed)
    row = pack_codes(codes, layout)
    assert row.shape == (*lead, layout.code_bytes)
    assert torch.equal(unpack_codes(row, layout), codes)


@settings(deadline=None)
@given(layout=st.sampled_from(LAYOUTS), seed=st.integers(0, 2**31))
def test_pack_inverts_unpack_for_any_bytes(layout: VectorLayout, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    row = torch.randint(0, 256, (5, layout.code_bytes), dtype=torch.uint8, generator=generator)
    assert torch.equal(pack_codes(unpack_codes(row, layout), layout), row)


def test_codes_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="a code is 8; 3-bit codes end at 7"):
        pack_codes(torch.full((64,), 8, dtype=torch.uint8), VectorLayout(64, 3, "cubic"))
    codes = torch.full((64,), 7, dtype=torch.uint8)
    with pytest.raises(ValueError, match="a code is 7; 2-bit codes end at 3"):
        pack_codes(codes, VectorLayout(64, 2.5, "cubic"))
    codes[32:] = 3
    assert torch.equal(
        unpack_codes(pack_codes(codes, VectorLayout(64, 2.5, "int8")), VectorLayout(64, 2.5, "int8")), codes
    )


def test_wrong_dtype_and_shape_are_refused() -> None:
    layout = VectorLayout(64, 4, "int8")
    with pytest.raises(ValueError, match=r"codes are torch\.int64"):
        pack_codes(torch.zeros(64, dtype=torch.int64), layout)
    with pytest.raises(ValueError, match=r"last dimension must be head_dim = 64"):
        pack_codes(torch.zeros(63, dtype=torch.uint8), layout)
    with pytest.raises(ValueError, match=r"last dimension must be code_bytes = 32"):
        unpack_codes(torch.zeros(64, dtype=torch.uint8), layout)
