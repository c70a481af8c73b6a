"""The custom operators: registered rightly, and no graph break when the provider is called in a compiled function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from turboquant_core import Attended, CacheCodec, Gathered, KernelRequest, Packed, codec_arguments
from turboquant_core.testing.cases import PagedCase, page_layout, paged_case, random_query
from turboquant_triton import TritonProvider
from turboquant_triton.operators import OPERATORS as CALLS

OPERATORS = torch.ops.turboquant_triton
LENGTHS = [40, 0, 17]
DTYPE = torch.float16
PROVIDER = TritonProvider(portable=True)
VARIANT = "triton portable"
BACKENDS = ("eager", "aot_eager")


def a_case(device: torch.device, value_bits: int | None = 3, **options: Any) -> PagedCase:
    return paged_case(page_layout(4, value_bits, 64, value_head_dim=80), LENGTHS, DTYPE, device, **options)


def codec_operands(codec: CacheCodec) -> tuple[list[Tensor], list[Tensor], list[int]]:
    key, value = codec_arguments.codec_tensors(codec.key), codec_arguments.codec_tensors(codec.value)
    return key, value, codec_arguments.cache_integers(codec)


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch.compiler.reset()


def equal(got: Any, expected: Any) -> None:
    for actual, wanted in zip(got, expected, strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("value_bits", [2, 2.5, 3, 3.5, 4, None])
@pytest.mark.parametrize("centred", [False, True])
def test_codecs_survive_the_way_through_arguments(value_bits: float | None, centred: bool) -> None:
    layout = page_layout(3.5, value_bits, 64, value_head_dim=96, page_size=32, kv_heads=3)
    center = torch.randn(3, 64) if centred else None
    codec = CacheCodec.create(layout, key_scale="renorm", value_scale="norm", center=center)
    back = codec_arguments.rebuild_cache_codec(*codec_operands(codec))
    assert back.layout == codec.layout
    assert (back.value is None) == (codec.value is None)
    for half, original in ((back.key, codec.key), (back.value, codec.value)):
        if half is not None and original is not None:
            assert (half.layout, half.scale_rule) == (original.layout, original.scale_rule)
            equal(codec_arguments.codec_tensors(half), codec_arguments.codec_tensors(original))


class TestRegistration:
    """torch.library.opcheck: schema (what is written is declared, nothing else), fake implementation, AOT dispatch."""

    def test_encode(self, device: torch.device) -> None:
        codec = a_case(device).codec.key
        operands = codec_arguments.codec_tensors(codec), codec_arguments.vector_integers(codec)
        torch.library.opcheck(OPERATORS.encode, (torch.randn(3, 2, 64, device=device).to(DTYPE), *operands, VARIANT))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    def test_decode(self, dtype: torch.dtype, device: torch.device) -> None:
        codec = a_case(device).codec.key
        packed = PROVIDER.encode(torch.randn(3, 2, 64, device=device), codec)
        operands = codec_arguments.codec_tensors(codec), codec_arguments.vector_integers(codec)
        torch.library.opcheck(OPERATORS.decode, (*packed, *operands, dtype, VARIANT))

    def test_scores(self, device: torch.device) -> None:
        codec = a_case(device).codec.key
        packed = PROVIDER.encode(torch.randn(2, 1, 9, 64, device=device), codec)
        operands = codec_arguments.codec_tensors(codec), codec_arguments.vector_integers(codec)
        torch.library.opcheck(
            OPERATORS.scores, (torch.randn(1, 3, 2, 64, device=device), *packed, *operands, 0.5, VARIANT)
        )

    @pytest.mark.parametrize("value_bits", [3, None])
    def test_store(self, value_bits: int | None, device: torch.device) -> None:
        case = a_case(device, value_bits)
        arguments = (case.key, case.value, case.pages, case.slots, *codec_operands(case.codec), VARIANT)
        torch.library.opcheck(OPERATORS.store, arguments)

    @pytest.mark.parametrize("given", [False, True])
    def test_attend(self, given: bool, device: torch.device) -> None:
        case = a_case(device, center=None if given else torch.randn(2, 64))
        query = random_query(case, len(LENGTHS), 2, DTYPE)
        out = torch.zeros(*query.shape[:2], 80, dtype=DTYPE, device=device)
        # Uninitialised scratch would differ from run to run, which looks like an undeclared write.
        workspace = torch.zeros(workspace_bytes(case, query), dtype=torch.uint8, device=device) if given else None
        starts = torch.zeros(4, dtype=torch.int32, device=device)
        starts[1:] = torch.arange(1, 4)
        sinks = torch.randn(4, device=device) if given else None
        options = (20, 30.0, starts, case.seq_lens // 4, sinks) if given else (None, None, None, None, None)
        torch.library.opcheck(
            OPERATORS.attend,
            (
                query, case.pages, case.block_table, case.seq_lens, *codec_operands(case.codec), 0.1, *options,
                out, workspace, VARIANT,
            ),
        )  # fmt: skip

    @pytest.mark.parametrize("rotated", [False, True])
    @pytest.mark.parametrize("value_bits", [3, None])
    def test_gather(self, value_bits: int | None, rotated: bool, device: torch.device) -> None:
        case = a_case(device, value_bits)
        finite = case.pages.clamp(max=100)  # NaN, which unwritten slots hold, equals nothing
        arguments = (finite, case.block_table, *codec_operands(case.codec), 3, 30, DTYPE, rotated, VARIANT)
        torch.library.opcheck(OPERATORS.gather, arguments)


def workspace_bytes(case: PagedCase, query: Tensor) -> int:
    layout = case.codec.layout
    request = KernelRequest(layout, query.device, query.dtype, query.shape[1] // layout.kv_heads)
    return PROVIDER.workspace_bytes(request, query.shape[0], case.seq_lens.shape[0])


def check_compiled(function: Callable[..., Any], *arguments: Any, backend: str, **options: Any) -> Any:
    """Results of the compiled function, equal to those of the plain one."""
    compiled: Callable[..., Any] = torch.compile(function, backend=backend, fullgraph=True, **options)
    got = compiled(*arguments)
    equal(got, function(*arguments))
    return got


@pytest.mark.parametrize("backend", BACKENDS)
class TestFullGraph:
    def test_vectors(self, backend: str, device: torch.device) -> None:
        codec = a_case(device, center=torch.randn(2, 64)).codec.key

        def there_and_back(x: Tensor, query: Tensor) -> tuple[Tensor, ...]:
            packed = PROVIDER.encode(x * 2, codec)
            back = PROVIDER.decode(packed, codec, DTYPE)
            flat = Packed(packed.codes.transpose(0, 1), packed.scales.transpose(0, 1))
            return *packed, back + 1, PROVIDER.scores(query, flat, codec, scaling=0.5)

        x, query = torch.randn(5, 2, 64, device=device), torch.randn(2, 3, 64, device=device)
        check_compiled(there_and_back, x, query, backend=backend)

    def test_gather(self, backend: str, device: torch.device) -> None:
        case = a_case(device)

        def read(pages: Tensor, table: Tensor) -> Gathered:
            return PROVIDER.gather(pages, table, case.codec, start=2, stop=20, dtype=DTYPE)

        got = check_compiled(read, case.pages.clamp(max=100), case.block_table, backend=backend)
        assert got.keys.shape == (3, 2, 18, 64)

    @pytest.mark.parametrize("given", [False, True])
    def test_attend(self, given: bool, backend: str, device: torch.device) -> None:
        case = a_case(device)
        query = random_query(case, len(LENGTHS), 2, DTYPE)
        out = torch.zeros(*query.shape[:2], 80, dtype=DTYPE, device=device)
        workspace = torch.empty(workspace_bytes(case, query), dtype=torch.uint8, device=device)
        memory = {"out": out, "workspace": workspace} if given else {}

        def read(query: Tensor, pages: Tensor, table: Tensor, lengths: Tensor) -> Attended:
            return PROVIDER.attend(query * 1.5, pages, table, lengths, case.codec, scaling=0.1, window=9, **memory)

        compiled = torch.compile(read, backend=backend, fullgraph=True)
        got = compiled(query, case.pages, case.block_table, case.seq_lens)
        assert (got.out.data_ptr() == out.data_ptr()) == given
        equal([part.clone() for part in got], read(query, case.pages, case.block_table, case.seq_lens))

    def test_decode_steps_over_static_pages(self, backend: str, device: torch.device) -> None:
        """What a compiled generation loop does: one graph, lengths and slots on the device, pages written in place."""
        case = a_case(device)
        plain, pages = case.pages.clone(), case.pages.clone()

        def step(x: Tensor, value: Tensor, pages: Tensor, lengths: Tensor) -> Tensor:
            page = case.block_table.gather(1, (lengths.long() // 16).unsqueeze(1)).squeeze(1)
            slots = page.long() * 16 + lengths % 16
            PROVIDER.store(x[:, :2], value, pages, slots, case.codec)
            read = PROVIDER.attend(x, pages, case.block_table, lengths + 1, case.codec, scaling=0.1)
            return read.out.flatten(1) * 0.5

        # Imported here: what some releases of torch warn of then is no error in a test.
        from torch._dynamo.testing import CompileCounterWithBackend

        counter = CompileCounterWithBackend(backend)
        compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=False)
        lengths = torch.tensor([40, 0, 17], dtype=torch.int32, device=device)
        for _ in range(3):
            x, value = torch.randn(3, 4, 64, device=device).to(DTYPE), torch.randn(3, 2, 80, device=device).to(DTYPE)
            assert torch.equal(compiled(x, value, pages, lengths), step(x, value, plain, lengths))
            assert torch.equal(pages, plain)
            lengths += 1
        assert counter.frame_count == 1
        assert not torch.equal(pages, case.pages)


def test_eager_calls_do_not_pass_through_the_operators(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator's dispatch is host time in every layer of every eager decode step."""
    for name in ("encode", "decode", "scores", "store", "attend", "gather"):
        monkeypatch.setattr(CALLS, name, None)
    case = a_case(device)
    PROVIDER.store(case.key, case.value, case.pages, case.slots, case.codec)
    query = random_query(case, len(LENGTHS), 2, DTYPE)
    PROVIDER.attend(query, case.pages, case.block_table, case.seq_lens, case.codec, scaling=0.1)
    PROVIDER.gather(case.pages, case.block_table, case.codec, start=0, stop=3, dtype=DTYPE)
    packed = PROVIDER.encode(case.key[..., :], case.codec.key)
    PROVIDER.scores(query[:, :2], PROVIDER.encode(case.key[:3, :2], case.codec.key), case.codec.key, scaling=0.1)
    PROVIDER.decode(packed, case.codec.key)


def test_bad_input_raises_the_same_error_in_a_compiled_function(device: torch.device) -> None:
    case = a_case(device)

    def read(query: Tensor) -> Attended:
        return PROVIDER.attend(query, case.pages, case.block_table, case.seq_lens.long(), case.codec, scaling=0.1)

    with pytest.raises(ValueError, match=r"seq_lens is torch\.int64"):
        torch.compile(read, backend="eager", fullgraph=True)(random_query(case, len(LENGTHS), 2, DTYPE))
