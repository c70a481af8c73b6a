"""What CUDA graphs need, shown without a GPU: device tensors are meta tensors, which nothing can read on the host.

A graph replays with the addresses of its capture: metadata must be views of vLLM's own buffers, and a layer's work on
decoding rows must allocate nothing and never wait for the device. What kernels do inside is their own package's matter.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from turboquant_core import CacheCodec
from turboquant_vllm.options import LayerBits, Options
from turboquant_vllm.packing import LayerShape
from turboquant_vllm.scratch import Scratch

with warnings.catch_warnings():
    # vLLM's imports, and torch's of its compiler, use what is deprecated.
    warnings.simplefilter("ignore")
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.worker import workspace as vllm_workspace

    from turboquant_vllm.impl import PackedAttention
    from turboquant_vllm.metadata import StepMetadataBuilder
    from turboquant_vllm.step import PackedRows, StepMetadata

ROWS, PAGES, TOKENS, PAGE, DRAFTS = 8, 6, 32, 16, 3
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 64
VIEWS = {f"aten.{name}" for name in ("slice.Tensor", "view.default", "view.dtype", "select.int", "detach.default")}


class Buffers:
    """The persistent tensors of a model runner; ``device`` meta stands for a GPU."""

    def __init__(self, device: str) -> None:
        self.starts = torch.zeros(ROWS + 1, dtype=torch.int32, device=device)
        self.lengths = torch.zeros(ROWS, dtype=torch.int32, device=device)
        self.tables = torch.zeros(ROWS, PAGES, dtype=torch.int32, device=device)
        self.slots = torch.full((TOKENS,), -1, dtype=torch.int64, device=device)

    def step(self, *tokens: int) -> CommonAttentionMetadata:
        """A step of rows with ``tokens`` each; rows of none are padding."""
        host = torch.tensor([0, *tokens], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        rows, total = len(tokens), int(host[-1])
        return CommonAttentionMetadata(
            query_start_loc=self.starts[: rows + 1],
            query_start_loc_cpu=host,
            seq_lens=self.lengths[:rows],
            num_reqs=rows,
            num_actual_tokens=total,
            max_query_len=max(tokens),
            max_seq_len=64,
            block_table_tensor=self.tables[:rows],
            slot_mapping=self.slots[:total],
            seq_lens_cpu_upper_bound=torch.tensor([20 + count for count in tokens], dtype=torch.int32),
            is_prefilling=torch.tensor([count > 1 + DRAFTS for count in tokens]),
        )


def builder(drafts: int = 0) -> tuple[StepMetadataBuilder, list[int]]:
    """A builder for one layer, and the page sizes that its layer was prepared for."""
    prepared: list[int] = []
    speculative = SimpleNamespace(num_speculative_tokens=drafts, parallel_drafting=False) if drafts else None
    layer = SimpleNamespace(impl=SimpleNamespace(prepare=prepared.append))
    config = SimpleNamespace(
        speculative_config=speculative,
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        compilation_config=SimpleNamespace(static_forward_context={"layer": layer}),
    )
    spec = SimpleNamespace(block_size=PAGE, page_size_padded=None)
    return StepMetadataBuilder(spec, ["layer"], config, torch.device("meta")), prepared


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("turboquant_vllm.metadata.announce", lambda config: None)


def packed(metadata: StepMetadata) -> PackedRows:
    assert metadata.packed is not None
    return metadata.packed


def test_codecs_are_made_with_the_builder() -> None:
    assert builder()[1] == [PAGE]


@pytest.mark.parametrize(("drafts", "tokens"), [(0, 1), (DRAFTS, 1 + DRAFTS)])
def test_a_capture_reads_nothing_from_the_device(drafts: int, tokens: int) -> None:
    metadata = builder(drafts)[0].build_for_cudagraph_capture(Buffers("meta").step(*[tokens] * 4))
    assert metadata.prompts is None
    assert packed(metadata).tokens == 4 * tokens
    assert packed(metadata).query_start_loc is None


def test_padded_rows_stay_in_the_step_and_have_no_tokens() -> None:
    buffers = Buffers("cpu")
    buffers.lengths[:3] = 21
    rows = packed(builder()[0].build(0, buffers.step(1, 1, 1, 0)))
    assert rows.seq_lens.tolist() == [21, 21, 21, 0]
    assert rows.query_start_loc is not None
    assert rows.tokens == 3


def test_a_later_step_lies_where_the_capture_did() -> None:
    buffers, steps = Buffers("cpu"), builder()[0]
    captured = steps.build_for_cudagraph_capture(buffers.step(*[1] * ROWS))
    later = steps.build(0, buffers.step(*[1] * 5))
    for name in ("block_table", "seq_lens"):
        assert getattr(packed(captured), name).data_ptr() == getattr(packed(later), name).data_ptr()
    assert captured.slot_mapping.data_ptr() == later.slot_mapping.data_ptr() == buffers.slots.data_ptr()
    assert packed(captured).block_table.stride() == packed(later).block_table.stride()


def test_prompts_are_planned_from_the_host() -> None:
    metadata = builder()[0].build(0, Buffers("meta").step(1, 9, 12))
    assert metadata.prompts is not None
    assert [(row.first, row.last, row.context) for row in metadata.prompts.rows] == [(0, 9, 20), (9, 21, 20)]
    assert packed(metadata).tokens == 1


class Allocations(TorchDispatchMode):
    """Names of the operations that are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func) not in VIEWS:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


class Recorder:
    """A kernel provider that takes notes."""

    name = "recorder"

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def workspace_bytes(self, request: Any, tokens: int, batch: int) -> int:
        return 1000 * tokens

    def store(self, key: Tensor, value: Tensor, pages: Tensor, slots: Tensor, codec: CacheCodec) -> None:
        self.calls.append(("store", {"key": key, "pages": pages, "slots": slots}))

    def attend(self, query: Tensor, pages: Tensor, table: Tensor, lengths: Tensor, codec: Any, **more: Any) -> None:
        self.calls.append(("attend", {"query": query, "pages": pages, "table": table, "lengths": lengths, **more}))


@contextmanager
def workspace(device: str) -> Iterator[None]:
    """vLLM's workspace manager of a worker, on ``device``."""
    held = vllm_workspace._manager
    vllm_workspace._manager = vllm_workspace.WorkspaceManager(torch.device(device), 1)
    try:
        yield
    finally:
        vllm_workspace._manager = held


@pytest.fixture
def on_meta(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    with workspace("meta"):
        yield


def scratch(provider: Recorder, **compilation: Any) -> Scratch:
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=ROWS),
        speculative_config=None,
        compilation_config=SimpleNamespace(**compilation),
        model_config=SimpleNamespace(max_model_len=256),
    )
    shape = LayerShape(KV_HEADS, HEAD_DIM, 2)
    setup: Any = SimpleNamespace(provider=provider, request=None, shape=shape)
    return Scratch.of(config, setup)


def attention(provider: Recorder, **arguments: Any) -> Any:
    """A layer that was set up, without an engine around it."""
    impl = PackedAttention(HEADS, HEAD_DIM, 0.125, KV_HEADS, **arguments)
    layout = LayerShape(KV_HEADS, HEAD_DIM, 2).page_layout(LayerBits(4, 4), PAGE)
    setup: Any = SimpleNamespace(provider=provider, options=Options(), codec=lambda size: CacheCodec.create(layout))
    impl.setup = setup
    impl._scratch = scratch(provider, max_cudagraph_capture_size=TOKENS)
    impl.prepare(PAGE)
    return impl


def heads(count: int, tokens: int = TOKENS) -> Tensor:
    return torch.empty(tokens, count, HEAD_DIM, dtype=torch.bfloat16, device="meta")


def cache(blocks: int = 10) -> Tensor:
    return torch.empty(blocks, KV_HEADS, PAGE, 68, dtype=torch.uint8, device="meta")


@pytest.mark.usefixtures("on_meta")
@pytest.mark.parametrize("tokens", [1, 1 + DRAFTS])
def test_decoding_allocates_nothing_and_reads_nothing(tokens: int) -> None:
    provider = Recorder()
    impl = attention(provider, logits_soft_cap=30.0)
    query, key, value, output = heads(HEADS), heads(KV_HEADS), heads(KV_HEADS), heads(HEADS)
    step = builder(DRAFTS)[0].build_for_cudagraph_capture(Buffers("meta").step(*[tokens] * 4))
    impl.forward(None, query, key, value, torch.empty(0, device="meta"), None, output)
    pages = cache()
    with Allocations() as done:
        impl.do_kv_cache_update(None, key, value, pages, step.slot_mapping)
        assert impl.forward(None, query, key, value, pages, step, output) is output
    assert done.found == []
    (_, stored), (_, attended) = provider.calls
    assert stored["slots"].shape == (4 * tokens,)
    assert stored["key"].shape == (4 * tokens, KV_HEADS, HEAD_DIM)
    assert attended["pages"].shape == (10, KV_HEADS, PAGE * 68)
    assert attended["out"].shape == attended["query"].shape == (4 * tokens, HEADS, HEAD_DIM)
    assert attended["query_start_loc"] is None
    assert (attended["softcap"], attended["sinks"], attended["window"]) == (30.0, None, None)
    assert attended["workspace"].shape == (1000 * TOKENS,)


@pytest.mark.usefixtures("on_meta")
def test_profiling_takes_all_that_later_steps_need() -> None:
    """After it vLLM locks the workspace: a step that needs more would fail."""
    provider = Recorder()
    impl = attention(provider)
    manager = vllm_workspace.current_workspace_manager()
    query = heads(HEADS)
    impl.forward(None, query, heads(KV_HEADS), heads(KV_HEADS), torch.empty(0, device="meta"), None, query)
    manager.lock()
    first = impl._scratch.workspace(1, 1)
    for tokens in (1, ROWS, TOKENS):
        # Captured graphs of every size and eager steps share one piece of memory.
        assert impl._scratch.workspace(tokens, min(tokens, ROWS)).shape == first.shape


def test_an_empty_cache_is_left_alone() -> None:
    """Memory is measured before there are pages."""
    provider = Recorder()
    attention(provider).do_kv_cache_update(None, heads(KV_HEADS), heads(KV_HEADS), torch.empty(0), torch.zeros(3))
    assert provider.calls == []


def test_pages_are_vllms_own_memory_wherever_it_lies() -> None:
    """Sleep mode unmaps the cache and maps it anew: nothing here may keep or copy it."""
    impl = attention(Recorder())
    for blocks in (3, 7):
        mapped = torch.zeros(blocks, KV_HEADS, PAGE, 68, dtype=torch.uint8)
        pages, _ = impl._pages(mapped)
        assert pages.data_ptr() == mapped.data_ptr()
        assert pages.shape == (blocks, KV_HEADS, PAGE * 68)
    kept = list(impl._codecs.values())
    assert all(tensor.numel() < mapped.numel() for codec in kept for tensor in (codec.key.levels, codec.key.signs))


@pytest.mark.parametrize("views", [lambda kv: kv.transpose(1, 2), lambda kv: kv[:, :, :8], lambda kv: kv[::2]])
def test_pages_in_another_order_are_refused(views: Any) -> None:
    from turboquant_vllm.errors import UnsupportedError

    with pytest.raises(UnsupportedError, match="packed pages need the blocks of a layer one after the other"):
        attention(Recorder())._pages(views(torch.zeros(6, KV_HEADS, PAGE, 68, dtype=torch.uint8)))
