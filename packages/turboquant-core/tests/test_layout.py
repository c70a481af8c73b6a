"""Sizes come from one place, and bad sizes are refused with the way out."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from turboquant_core import LayoutError, PageLayout, RawLayout, VectorLayout


def page(k_bits: float, v_bits: float, head_dim: int = 128) -> PageLayout:
    return PageLayout(
        VectorLayout(head_dim, k_bits, "int8"), VectorLayout(head_dim, v_bits, "cubic"), page_size=16, kv_heads=8
    )


@pytest.mark.parametrize(
    ("k_bits", "v_bits", "expected"),
    [(4, 4, 132), (4, 3, 116), (3, 3, 100), (4, 2, 100), (3, 2, 84), (2, 2, 68), (3.5, 3.5, 116), (2.5, 2.5, 84)],
)
def test_token_bytes_at_head_dim_128(k_bits: float, v_bits: float, expected: int) -> None:
    assert page(k_bits, v_bits).token_bytes == expected


@pytest.mark.parametrize(("bits", "widths"), [(2.5, (3, 2)), (3.5, (4, 3))])
def test_fractional_bits_are_two_halves(bits: float, widths: tuple[int, int]) -> None:
    for head_dim in (16, 64, 112, 576):
        layout = VectorLayout(head_dim, bits, "int8")
        assert layout.is_mixed
        assert layout.parts == tuple(VectorLayout(head_dim // 2, width, "int8") for width in widths)
        assert layout.code_bytes == sum(part.code_bytes for part in layout.parts) == head_dim * bits / 8
        with pytest.raises(LayoutError, match="two code widths"):
            _ = layout.width


def test_one_width_is_its_own_part() -> None:
    layout = VectorLayout(128, 3.0, "int8")
    assert layout == VectorLayout(128, 3, "int8")
    assert type(layout.bits) is int
    assert not layout.is_mixed
    assert layout.parts == (layout,)
    assert layout.width == 3


@pytest.mark.parametrize(
    ("head_dim", "bits", "expected"),
    [(128, 4, 16), (128, 3, 16), (128, 2, 16), (64, 3, 8), (128, 2.5, 8), (128, 3.5, 8), (256, 2.5, 16), (80, 3, 2),
     (112, 2.5, 1), (16, 3.5, 1), (64, 2.5, 4)],
)  # fmt: skip
def test_alignment(head_dim: int, bits: float, expected: int) -> None:
    layout = VectorLayout(head_dim, bits, "cubic")
    assert layout.alignment == expected
    starts = [row * layout.code_bytes + part for row in range(9) for part in (0, layout.parts[0].code_bytes)]
    assert all(start % expected == 0 for start in starts)


@pytest.mark.parametrize("head_dim", [8, 24, 120, 1000])
def test_halves_that_do_not_pack_are_refused(head_dim: int) -> None:
    with pytest.raises(LayoutError, match=rf"head_dim is {head_dim}; 2\.5 bits need a multiple of 16"):
        VectorLayout(head_dim, 2.5, "int8")


def test_fields_of_a_chunk_do_not_overlap_and_fill_it() -> None:
    layout = page(4, 3)
    assert layout.value_offset == 16 * 64
    assert layout.key_scale_offset == 16 * (64 + 48)
    assert layout.value_scale_offset == 16 * (64 + 48 + 2)
    assert layout.chunk_bytes == 16 * (64 + 48 + 2 + 2)
    assert layout.page_bytes == 8 * layout.chunk_bytes
    assert layout.pages_shape(5) == (5, 8, layout.chunk_bytes)


def test_raw_values_have_no_scale() -> None:
    layout = PageLayout(VectorLayout(64, 4, "int8"), RawLayout(64), page_size=32, kv_heads=2)
    assert layout.token_bytes == 32 + 2 + 128
    assert layout.chunk_bytes == layout.value_scale_offset


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (16, 1), (17, 2)])
def test_pages_for(tokens: int, pages: int) -> None:
    assert page(4, 4).pages_for(tokens) == pages


@pytest.mark.parametrize("bits", [0, 1, 5, 8, 2.25, 4.5, float("nan"), True, None])
def test_other_bits_are_refused(bits: Any) -> None:
    with pytest.raises(LayoutError, match=rf"bits is {bits!r}; the packed layout has \(2, 2\.5, 3, 3\.5, 4\)"):
        VectorLayout(128, bits, "int8")


def test_a_number_in_a_string_is_told_from_a_number() -> None:
    with pytest.raises(LayoutError, match=r"bits is '4', a string: pass a number, one of \(2, 2\.5, 3, 3\.5, 4\)"):
        VectorLayout(128, "4", "int8")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("head_dim", "nearest"),
    [(0, "8"), (-8, "8"), (4, "8"), (100, "96 or 104"), (180, "176 or 192"), (1032, "1024")],
)
def test_other_head_dims_are_refused(head_dim: int, nearest: str) -> None:
    """Those that are named can be packed: 184 has no rotation."""
    with pytest.raises(LayoutError, match=rf"head_dim is {head_dim}; .*, here {nearest}: .* append zeros"):
        VectorLayout(head_dim, 4, "int8")


def test_unknown_form_is_refused() -> None:
    with pytest.raises(LayoutError, match="form is 'fp4'"):
        VectorLayout(128, 4, "fp4")  # type: ignore[arg-type]


@pytest.mark.parametrize("page_size", [0, 8, 17, -16])
def test_page_size_must_be_a_multiple_of_16(page_size: int) -> None:
    with pytest.raises(LayoutError, match=rf"page_size is {page_size}"):
        PageLayout(VectorLayout(64, 4, "int8"), RawLayout(64), page_size=page_size, kv_heads=1)


@pytest.mark.parametrize("value", [16.0, True, "16", None])
@pytest.mark.parametrize("name", ["page_size", "kv_heads"])
def test_what_is_no_integer(name: str, value: Any) -> None:
    arguments: dict[str, Any] = {"page_size": 16, "kv_heads": 1, name: value}
    with pytest.raises(LayoutError, match=re.escape(f"{name} is {value!r}; it must be an integer")):
        PageLayout(VectorLayout(64, 4, "int8"), RawLayout(64), **arguments)


def test_numbers_of_numpy_become_ints() -> None:
    layout = PageLayout(VectorLayout(np.int64(64), 4, "int8"), RawLayout(64), np.int32(16), np.int64(2))
    assert [type(n) for n in (layout.key.head_dim, layout.page_size, layout.kv_heads)] == [int] * 3


def test_kv_heads_and_versions_are_checked() -> None:
    key, value = VectorLayout(64, 4, "int8"), VectorLayout(64, 4, "cubic", version=2)
    with pytest.raises(LayoutError, match="kv_heads is 0"):
        PageLayout(key, RawLayout(64), page_size=16, kv_heads=0)
    with pytest.raises(LayoutError, match="version 1 differs from value layout version 2"):
        PageLayout(key, value, page_size=16, kv_heads=1)


def test_raw_itemsize_is_checked() -> None:
    with pytest.raises(LayoutError, match="itemsize is 1"):
        RawLayout(64, itemsize=1)
