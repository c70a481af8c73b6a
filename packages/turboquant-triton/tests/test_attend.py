"""Attention against float64 over what the conformance suite leaves out, and the memory that a call takes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from turboquant_core import KernelRequest, PageLayout, RawLayout, ReferenceProvider, VectorLayout
from turboquant_core.testing import ProviderConformance
from turboquant_core.testing.cases import PagedCase, page_layout, paged_case, random_query
from turboquant_triton import TritonProvider

GPU = torch.cuda.is_available()


class Suite(ProviderConformance):
    """Only its comparison with the oracle is used here."""

    __test__: ClassVar[bool] = False
    device = "cuda" if GPU else "cpu"
    dtype = torch.float16
    attention_tolerance = 3e-2 if GPU else 2e-3


SUITE = Suite()
FORMS = [True, False] if GPU else [True]
"""Whether the portable form is forced; the other one needs a GPU."""


@pytest.fixture(params=FORMS, ids=lambda portable: "portable" if portable else "permute")
def provider(request: pytest.FixtureRequest) -> TritonProvider:
    return TritonProvider(portable=request.param)


def check(provider: TritonProvider, layout: PageLayout, group: int, q_len: int, **options: Any) -> None:
    case = SUITE.case(layout, [max(q_len, 33), q_len, 0])
    SUITE.check_attend(provider, case, [q_len] * 3, group, **options)


@pytest.mark.parametrize("group", [1, 2, 3, 5, 8, 9, 16, 17, 33])
def test_group_sizes(group: int, provider: TritonProvider) -> None:
    check(provider, page_layout(4, 3, 64, kv_heads=1), group, 1)


@pytest.mark.parametrize("q_len", range(1, 9))
def test_query_lengths(q_len: int, provider: TritonProvider) -> None:
    check(provider, page_layout(3, 4, 64, kv_heads=1), 3, q_len, window=7 if q_len % 2 else None)


@pytest.mark.slow
@pytest.mark.parametrize("q_len", range(1, 9))
@pytest.mark.parametrize("group", [*range(1, 17), 20, 32, 40])
def test_every_group_with_every_query_length(group: int, q_len: int, provider: TritonProvider) -> None:
    check(provider, page_layout(4, 4, 64, kv_heads=2), group, q_len)


@pytest.mark.parametrize(("head_dim", "value_head_dim"), [(64, 128), (128, 64), (192, 128), (80, 256)])
@pytest.mark.parametrize(("key_bits", "value_bits"), [(4, 2), (3, 3), (2, 4), (3, None)])
def test_two_head_dims(
    key_bits: int, value_bits: int | None, head_dim: int, value_head_dim: int, provider: TritonProvider
) -> None:
    check(provider, page_layout(key_bits, value_bits, head_dim, value_head_dim=value_head_dim, kv_heads=1), 2, 1)


@pytest.mark.parametrize(("key_bits", "value_bits"), [(2.5, 2.5), (3.5, 3.5), (3.5, 2), (4, 2.5), (2.5, None)])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_fractional_bits(head_dim: int, key_bits: float, value_bits: float | None, provider: TritonProvider) -> None:
    check(provider, page_layout(key_bits, value_bits, head_dim, kv_heads=2), 2, 2)


@pytest.mark.parametrize("head_dim", [80, 112])
def test_halves_that_are_no_whole_words_are_refused(head_dim: int, device: torch.device) -> None:
    request = KernelRequest(page_layout(4, 2.5, head_dim), device, torch.float16)
    reason = TritonProvider().unsupported_reason(request)
    assert reason == f"head_dim is {head_dim}, needs a multiple of 32 up to 256 at 2.5 bits"


@pytest.mark.slow
@pytest.mark.parametrize("value_bits", [2, 3, 4, None])
@pytest.mark.parametrize("key_bits", [2, 3, 4])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 112, 128, 160, 192, 256])
def test_every_pair_of_widths(head_dim: int, key_bits: int, value_bits: int | None, provider: TritonProvider) -> None:
    check(provider, page_layout(key_bits, value_bits, head_dim, kv_heads=2), 4, 2)


def test_codebooks_of_the_other_form(provider: TritonProvider) -> None:
    layout = PageLayout(VectorLayout(64, 3, "cubic"), VectorLayout(64, 4, "int8"), page_size=32, kv_heads=2)
    check(provider, layout, 2, 2)


def test_values_in_single_precision(device: torch.device) -> None:
    case = paged_case(page_layout(4, None, 64, itemsize=4), [20, 3], torch.float32, device)
    query = random_query(case, 2, 2, torch.float32)
    arguments = (query, case.pages, case.block_table, case.seq_lens, case.codec)
    got = TritonProvider().attend(*arguments, scaling=0.1)
    expected = ReferenceProvider().attend(*arguments, scaling=0.1)
    torch.testing.assert_close(got.out, expected.out, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("head_dim", [8, 24, 264, 512, 1024])
def test_head_dims_that_do_not_fit_are_refused(head_dim: int, device: torch.device) -> None:
    for layout in (
        page_layout(4, 4, head_dim),
        page_layout(4, 4, 64, value_head_dim=head_dim),
        PageLayout(VectorLayout(64, 4, "int8"), RawLayout(head_dim), page_size=16, kv_heads=1),
    ):
        reason = TritonProvider().unsupported_reason(KernelRequest(layout, device, torch.float16))
        assert reason is not None
        assert str(head_dim) in reason
        assert "multiple of 16 up to 256" in reason


class Allocations(TorchDispatchMode):
    """Storages that appear while the mode is active, in bytes; the interpreter makes empty ones, which do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        known = {storage(leaf) for leaf in tensors((args, kwargs))}
        new = (leaf.untyped_storage().nbytes() for leaf in tensors(result) if storage(leaf) not in known)
        self.sizes += [size for size in new if size]
        return result


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def allocated(case: PagedCase, provider: TritonProvider, *, given: bool, **options: Any) -> list[int]:
    """Sizes of what one call allocates, warmed up; everything that can be given is, or nothing."""
    layout = case.codec.layout
    query = random_query(case, len(case.seq_lens), 2, torch.float16)
    memory = {}
    if given:
        request = KernelRequest(layout, query.device, query.dtype, 2)
        size = provider.workspace_bytes(request, query.shape[0], query.shape[0])
        workspace = torch.empty(size, dtype=torch.uint8, device=query.device)
        memory = {"out": torch.empty_like(query), "workspace": workspace}
    arguments = (query, case.pages, case.block_table, case.seq_lens, case.codec)
    provider.attend(*arguments, scaling=0.1, **memory, **options)
    with Allocations() as mode:
        provider.attend(*arguments, scaling=0.1, **memory, **options)
    return mode.sizes


@pytest.mark.parametrize("value_bits", [4, None])
def test_nothing_is_allocated_but_the_log_sum_exp(value_bits: int | None, provider: TritonProvider) -> None:
    case = paged_case(page_layout(4, value_bits, 64), [30, 9], torch.float16, SUITE.device)
    log_sum_exp = case.seq_lens.shape[0] * 4 * torch.float32.itemsize
    assert allocated(case, provider, given=True) == [log_sum_exp]
    starts = torch.zeros_like(case.seq_lens)
    assert allocated(case, provider, given=True, window=5, seq_starts=starts) == [log_sum_exp]


def test_no_allocation_grows_with_the_context(provider: TritonProvider) -> None:
    layout = page_layout(4, 4, 64, kv_heads=2)
    short, long = (
        allocated(paged_case(layout, [tokens], torch.float16, SUITE.device), provider, given=False)
        for tokens in (16, 300)
    )
    assert short == long
    out = 4 * 64 * torch.float16.itemsize
    request = KernelRequest(layout, torch.device(SUITE.device), torch.float16, 2)
    assert sorted(long) == sorted([out, 4 * torch.float32.itemsize, provider.workspace_bytes(request, 1, 1)])
