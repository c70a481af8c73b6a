"""The reference as custom operators: registered rightly, and no graph break in a compiled function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from turboquant_core import CacheCodec, Packed, ReferenceProvider
from turboquant_core.codec_arguments import cache_integers, codec_tensors, vector_integers
from turboquant_core.testing.cases import PagedCase, page_layout, paged_case, random_query

OPERATORS = torch.ops.turboquant_reference
PROVIDER = ReferenceProvider()
LENGTHS = [40, 0, 17]
DTYPE = torch.float16
CPU = torch.device("cpu")
VALUE_BITS = [2.5, 3, None]


def a_case(value_bits: float | None = 3, **options: Any) -> PagedCase:
    return paged_case(page_layout(4, value_bits, 64, value_head_dim=80), LENGTHS, DTYPE, CPU, **options)


def operands(codec: CacheCodec) -> tuple[list[Tensor], list[Tensor], list[int], str]:
    return codec_tensors(codec.key), codec_tensors(codec.value), cache_integers(codec), "reference"


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch.compiler.reset()


@pytest.mark.parametrize("value_bits", VALUE_BITS)
def test_operators_are_registered_rightly(value_bits: float | None) -> None:
    """torch.library.opcheck: what is written is declared, fake implementations tell the truth."""
    case = a_case(value_bits)
    vector = codec_tensors(case.codec.key), vector_integers(case.codec.key)
    packed = PROVIDER.encode(torch.randn(3, 64), case.codec.key)
    query = random_query(case, len(LENGTHS), 2, DTYPE)
    out = torch.zeros(*query.shape[:2], 80, dtype=DTYPE)
    options = (0.1, 9, None, None, case.seq_lens // 4, None, out, None)
    codec = operands(case.codec)
    finite = case.pages.clamp(max=100)  # NaN, which unwritten slots hold, equals nothing
    calls: dict[str, tuple[Any, ...]] = {
        "encode": (torch.randn(3, 64), *vector, "reference"),
        "decode": (*packed, *vector, torch.float16, "reference"),
        "scores": (torch.randn(2, 64), *packed, *vector, 0.5, "reference"),
        "store": (case.key, case.value, case.pages, case.slots, *codec),
        "attend": (query, case.pages, case.block_table, case.seq_lens, *codec[:3], *options, "reference"),
        "gather": (finite, case.block_table, *codec[:3], 3, 30, DTYPE, False, "reference"),
    }
    for name, arguments in calls.items():
        torch.library.opcheck(getattr(OPERATORS, name), arguments)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("value_bits", VALUE_BITS)
def test_a_decode_step_is_one_graph(value_bits: float | None, backend: str) -> None:
    case = a_case(value_bits)
    plain, pages = case.pages.clone(), case.pages.clone()

    def step(x: Tensor, value: Tensor, pages: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
        page = case.block_table.gather(1, (lengths.long() // 16).unsqueeze(1)).squeeze(1)
        PROVIDER.store(x[:, :2], value, pages, page.long() * 16 + lengths % 16, case.codec)
        read = PROVIDER.attend(x * 1.5, pages, case.block_table, lengths + 1, case.codec, scaling=0.1)
        return *read, *PROVIDER.gather(pages, case.block_table, case.codec, start=0, stop=1, dtype=DTYPE)

    counter = CompileCounterWithBackend(backend)
    compiled: Callable[..., Any] = torch.compile(step, backend=counter, fullgraph=True, dynamic=False)
    lengths = torch.tensor(LENGTHS, dtype=torch.int32)
    for _ in range(3):
        x, value = torch.randn(3, 4, 64, dtype=DTYPE), torch.randn(3, 2, 80, dtype=DTYPE)
        for got, expected in zip(compiled(x, value, pages, lengths), step(x, value, plain, lengths), strict=True):
            assert torch.equal(got, expected)
        assert torch.equal(pages, plain)
        lengths += 1
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_vectors_in_one_graph(backend: str) -> None:
    codec = a_case(center=torch.randn(2, 64)).codec.key

    def there_and_back(x: Tensor, query: Tensor) -> tuple[Tensor, ...]:
        packed = PROVIDER.encode(x * 2, codec)
        flat = Packed(packed.codes.transpose(0, 1), packed.scales.transpose(0, 1))
        return *packed, PROVIDER.decode(packed, codec) + 1, PROVIDER.scores(query, flat, codec, scaling=0.5)

    x, query = torch.randn(5, 2, 64), torch.randn(2, 3, 64)
    compiled = torch.compile(there_and_back, backend=backend, fullgraph=True)
    for got, expected in zip(compiled(x, query), there_and_back(x, query), strict=True):
        assert torch.equal(got, expected)


def test_bad_input_raises_the_same_error_in_a_compiled_function() -> None:
    case = a_case()
    query = random_query(case, len(LENGTHS), 2, DTYPE)

    def read(query: Tensor) -> Tensor:
        return PROVIDER.attend(query, case.pages, case.block_table, case.seq_lens + 900, case.codec, scaling=0.1).out

    with pytest.raises(ValueError, match="a sequence has 940 tokens; the block table holds"):
        torch.compile(read, backend="eager", fullgraph=True)(query)
