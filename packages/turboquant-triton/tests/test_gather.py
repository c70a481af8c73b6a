"""Token ranges out of pages, against the reference."""

from __future__ import annotations

import pytest
import torch

from turboquant_core.reference import ReferenceProvider
from turboquant_core.testing.cases import PagedCase, page_layout, paged_case
from turboquant_core.testing.oracle import relative_error
from turboquant_triton.kernels.gather import gather

LENGTHS = [40, 33]


def check(case: PagedCase, start: int, stop: int, dtype: torch.dtype) -> None:
    for rotated in (False, True):
        arguments = {"start": start, "stop": stop, "dtype": dtype, "rotated": rotated}
        got = gather(case.pages, case.block_table, case.codec, **arguments)
        expected = ReferenceProvider().gather(case.pages, case.block_table, case.codec, **arguments)
        for name in ("keys", "values"):
            actual, wanted = getattr(got, name), getattr(expected, name)
            assert actual.shape == wanted.shape
            assert actual.dtype == dtype
            if rotated and dtype == torch.bfloat16:
                # Triton's interpreter truncates to bfloat16; a GPU rounds.
                torch.testing.assert_close(actual, wanted, rtol=torch.finfo(dtype).eps, atol=0)
            elif rotated:
                assert torch.equal(actual, wanted)
            elif wanted.numel():
                error = relative_error(actual.float(), wanted.double().cpu().numpy())
                assert error <= 1e-6 + torch.finfo(dtype).eps


@pytest.mark.parametrize(("key_bits", "value_bits"), [(4, 4), (3, 2), (2, 3)])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 112, 128, 160, 192, 256])
def test_every_head_dim(head_dim: int, key_bits: int, value_bits: int, device: torch.device) -> None:
    case = paged_case(page_layout(key_bits, value_bits, head_dim), LENGTHS, torch.float32, device)
    check(case, 7, 33, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_values_in_full_precision(dtype: torch.dtype, device: torch.device) -> None:
    layout = page_layout(4, None, 80, itemsize=dtype.itemsize)
    check(paged_case(layout, LENGTHS, dtype, device), 3, 33, dtype)


@pytest.mark.parametrize(("key_bits", "value_bits"), [(2.5, 3.5), (3.5, 4), (3, 2.5)])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 160, 192, 256])
def test_two_widths(head_dim: int, key_bits: float, value_bits: float, device: torch.device) -> None:
    case = paged_case(page_layout(key_bits, value_bits, head_dim), LENGTHS, torch.float32, device)
    check(case, 7, 33, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_and_two_head_dims(dtype: torch.dtype, device: torch.device) -> None:
    layout = page_layout(4, 3, 64, value_head_dim=128, kv_heads=3)
    check(paged_case(layout, LENGTHS, torch.float16, device), 0, 20, dtype)


def test_center_is_added_back(device: torch.device) -> None:
    case = paged_case(page_layout(4, 4, 64), LENGTHS, torch.float32, device, center=torch.randn(2, 64) * 3)
    check(case, 1, 30, torch.float32)


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (5, 5), (0, 1), (16, 32), (15, 17), (0, 33)])
def test_ranges(start: int, stop: int, device: torch.device) -> None:
    check(paged_case(page_layout(4, 4, 64), LENGTHS, torch.float32, device), start, stop, torch.float32)


def test_strided_table_with_pages_that_do_not_exist(device: torch.device) -> None:
    case = paged_case(page_layout(4, 4, 64), LENGTHS, torch.float32, device)
    table = case.block_table.clone()
    table[1, 2] = -1
    table = torch.stack((table, torch.full_like(table, 9999)), dim=-1)[..., 0]
    got = gather(case.pages, table, case.codec, start=0, stop=40, dtype=torch.float32)
    expected = ReferenceProvider().gather(
        case.pages, case.block_table, case.codec, start=0, stop=40, dtype=torch.float32
    )
    torch.testing.assert_close(got.keys[0], expected.keys[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.values[1, :, :32], expected.values[1, :, :32], rtol=1e-4, atol=1e-4)
    assert not got.keys[1, :, 32:].any()


def test_wrong_input_is_refused(device: torch.device) -> None:
    case = paged_case(page_layout(4, None, 64), LENGTHS, torch.float16, device)
    limit = case.block_table.shape[1] * 16
    with pytest.raises(ValueError, match=f"0..{limit} tokens"):
        gather(case.pages, case.block_table, case.codec, start=0, stop=limit + 1, dtype=torch.float16)
    with pytest.raises(ValueError, match="raw values have 2 bytes"):
        gather(case.pages, case.block_table, case.codec, start=0, stop=3, dtype=torch.float32)
    with pytest.raises(ValueError, match="block_table is"):
        gather(case.pages, case.block_table.float(), case.codec, start=0, stop=3, dtype=torch.float16)
