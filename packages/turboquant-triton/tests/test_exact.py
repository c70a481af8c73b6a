"""What the conformance suite leaves out of exact rows: strided input, mistakes, and CUDA graphs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from turboquant_core import Attended, KernelRequest, ReferenceProvider
from turboquant_core.exact import ExactRowsProvider, attend_with_exact
from turboquant_core.layout import ExactRows, PageLayout
from turboquant_core.testing.cases import PagedCase, page_layout, paged_case, random_query
from turboquant_triton import TritonProvider

GPU = torch.cuda.is_available()
DTYPE = torch.float16


def exact_layout(first: int = 4, ring: int = 10, page_size: int = 32) -> PageLayout:
    return page_layout(4, 4, 64, page_size=page_size, exact=ExactRows(first, ring, DTYPE.itemsize))


def attend(case: PagedCase, query: Tensor, recent: int) -> Attended:
    return attend_with_exact(
        TritonProvider(), query, case.pages, case.block_table, case.seq_lens, case.codec, recent=recent, scaling=0.2
    )


def test_the_provider_has_exact_rows(device: torch.device) -> None:
    provider = TritonProvider()
    assert isinstance(provider, ExactRowsProvider)
    layout = exact_layout()
    assert provider.unsupported_reason(KernelRequest(layout, device, DTYPE)) is None
    reason = provider.unsupported_reason(KernelRequest(layout, device, torch.float32))
    assert reason == "exact rows have 2 bytes a coordinate, torch.float32 has 4"


def test_keys_and_values_of_one_projection(device: torch.device) -> None:
    """Views into the output of one matrix product, as models hand them over."""
    layout = exact_layout()
    case = paged_case(layout, [50], DTYPE, device)
    both = torch.cat((case.key, case.value), 1)
    key, value = both[:, :2], both[:, 2:]
    assert not key.is_contiguous()
    pages, expected = torch.zeros_like(case.pages), torch.zeros_like(case.pages)
    TritonProvider().store_exact(key, value, pages, case.slots.int(), layout)
    ReferenceProvider().store_exact(key, value, expected, case.slots, layout)
    assert torch.equal(pages, expected)


def test_no_tokens_and_no_windows(device: torch.device) -> None:
    layout = exact_layout()
    case = paged_case(layout, [16], DTYPE, device)
    before = case.pages.clone()
    TritonProvider().store_exact(case.key[:0], case.value[:0], case.pages, case.slots[:0], layout)
    assert torch.equal(case.pages, before)
    plain = paged_case(exact_layout(0, 0), [16], DTYPE, device)
    query = random_query(plain, 1, 2, DTYPE)
    got = attend(plain, query, 0)
    arguments = (query, plain.pages, plain.block_table, plain.seq_lens, plain.codec)
    assert torch.equal(got.out, TritonProvider().attend(*arguments, scaling=0.2).out)


def test_wrong_input_is_refused(device: torch.device) -> None:
    layout = exact_layout()
    case = paged_case(layout, [40], DTYPE, device)
    provider = TritonProvider()
    with pytest.raises(ValueError, match=r"value is torch\.float32"):
        provider.store_exact(case.key, case.value.float(), case.pages, case.slots, layout)
    with pytest.raises(ValueError, match="exact rows have 2 bytes a coordinate; they cannot hold"):
        provider.store_exact(case.key.float(), case.value.float(), case.pages, case.slots, layout)
    with pytest.raises(ValueError, match="key is"):
        provider.store_exact(case.key[:, :1], case.value, case.pages, case.slots, layout)
    query = random_query(case, 1, 2, DTYPE)
    packed = Attended(query[..., :32], query.new_zeros(query.shape[:2], dtype=torch.float32))
    with pytest.raises(ValueError, match="packed is"):
        provider.attend_exact(
            query, case.pages, case.block_table, case.seq_lens, case.codec, packed, recent=4, scaling=1.0
        )


@pytest.mark.skipif(not GPU, reason="CUDA graphs need a GPU")
@pytest.mark.gpu
@pytest.mark.parametrize("q_len", [1, 3])
def test_a_step_in_a_cuda_graph(q_len: int) -> None:
    """Written and attended to in a graph that was captured for other lengths, a padded row included."""
    device, provider = torch.device("cuda"), TritonProvider()
    layout = exact_layout(4, 12, 64)
    case = paged_case(layout, [70, 200, 64, 9], DTYPE, device)
    query = random_query(case, 4 * q_len, 4, DTYPE)
    slots = torch.full((4 * q_len,), -1, device=device)
    key, value = case.key[: 4 * q_len].clone(), case.value[: 4 * q_len].clone()

    def step() -> Tensor:
        provider.store(key, value, case.pages, slots, case.codec)
        provider.store_exact(key, value, case.pages, slots, layout)
        return attend(case, query, 10).out

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    lengths = [66, 130, 0, 8]
    case.seq_lens.copy_(torch.tensor(lengths))
    for row, length in enumerate(lengths):
        position = torch.arange(length - q_len, length, device=device)
        own = case.block_table[row, position // 64].long() * 64 + position % 64
        slots[row * q_len : (row + 1) * q_len] = own if length else -1
    key.normal_()
    value.normal_()
    graph.replay()
    replayed, pages = captured.clone(), case.pages.clone()
    assert torch.equal(step(), replayed)
    assert torch.equal(case.pages, pages)
    assert replayed.isfinite().all()
