"""Kernels are compiled while an engine starts: every form that its steps launch is run once."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from turboquant_core import CacheCodec, KernelRequest, ReferenceProvider
from turboquant_core.layout import ExactRows
from turboquant_vllm.options import LayerBits, Options
from turboquant_vllm.packing import LayerShape
from turboquant_vllm.raw_attention import torch_attention

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from vllm.v1.worker import workspace as vllm_workspace

    from turboquant_vllm import warming
    from turboquant_vllm.impl import PackedAttention
    from turboquant_vllm.scratch import Scratch

HEADS, KV_HEADS, HEAD_DIM, PAGE = 4, 2, 64, 16
CPU = torch.device("cpu")
ROWS, TOKENS, LENGTH = 6, 40, 40
CONFIG: Any = SimpleNamespace(
    scheduler_config=SimpleNamespace(max_num_seqs=ROWS, max_num_batched_tokens=TOKENS),
    model_config=SimpleNamespace(max_model_len=LENGTH),
    speculative_config=None,
    compilation_config=SimpleNamespace(),
)


class Noting(ReferenceProvider):
    """The reference, which notes how it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.attended: set[tuple[int, int, bool]] = set()
        self.stored: set[int] = set()
        self.gathered: set[int] = set()

    def attend(
        self, query: Tensor, pages: Tensor, block_table: Tensor, seq_lens: Tensor, *rest: Any, **more: Any
    ) -> Any:
        self.attended.add((query.shape[0], len(seq_lens), more["query_start_loc"] is not None))
        return super().attend(query, pages, block_table, seq_lens, *rest, **more)

    def store(self, key: Tensor, *rest: Any, **more: Any) -> None:
        self.stored.add(len(key))
        super().store(key, *rest, **more)

    def gather(self, *arguments: Any, **more: Any) -> Any:
        self.gathered.add(more["stop"] - more["start"])
        return super().gather(*arguments, **more)


@pytest.fixture(autouse=True)
def workspace() -> Iterator[None]:
    held = vllm_workspace._manager
    vllm_workspace._manager = vllm_workspace.WorkspaceManager(CPU, 1)
    yield
    vllm_workspace._manager = held


def attention(provider: Any, exact: ExactRows = ExactRows(), options: Options | None = None, **arguments: Any) -> Any:  # noqa: B008
    """A layer that was set up, without an engine around it."""
    impl: Any = PackedAttention(HEADS, HEAD_DIM, 0.125, KV_HEADS, **arguments)
    shape = LayerShape(KV_HEADS, HEAD_DIM, 2)
    layout = shape.page_layout(LayerBits(4, 3), PAGE, exact)
    impl.setup = SimpleNamespace(
        provider=provider, options=options or Options(), codec=lambda size: CacheCodec.create(layout), shape=shape,
        request=KernelRequest(layout, CPU, torch.bfloat16, HEADS // KV_HEADS), exact=exact, center=None,
        token_bytes=layout.slot_bytes,
    )  # fmt: skip
    impl._attention = torch_attention
    impl._exact = provider if exact.rows else None
    impl._scratch = Scratch.of(CONFIG, impl.setup)
    impl.prepare(PAGE)
    return impl


def run(layer: Any, query: int) -> None:
    warming.run_forms(layer, warming.Extent.of(CONFIG, query), PAGE, CPU)


@pytest.mark.parametrize("query", [1, 3])
def test_every_form_is_run(query: int) -> None:
    provider = Noting()
    run(attention(provider), query)
    every = range(1, ROWS + 1)
    equal = {(rows * new, rows, False) for rows, new in itertools.product(every, range(1, query + 1))}
    ragged = {(tokens, 1, True) for tokens in range(1, ROWS * query + 1)}
    assert provider.attended == equal | ragged
    assert provider.stored == {1, TOKENS}
    assert provider.gathered == {1, LENGTH}


@pytest.mark.parametrize(
    "arguments",
    [
        {"logits_soft_cap": 20.0, "sinks": torch.zeros(HEADS)},
        {"options": Options(prefill="packed")},
        {"exact": ExactRows(2, 6, 2), "options": Options(sink_tokens=2, recent_tokens=4)},
    ],
)
def test_layers_of_every_kind_can_be_run(arguments: dict[str, Any]) -> None:
    provider = Noting()
    run(attention(provider, **arguments), 2)
    assert provider.gathered
    assert provider.stored == {1, TOKENS}


@pytest.mark.usefixtures("sized_pages")
def test_layers_with_a_window_can_be_run() -> None:
    test_layers_of_every_kind_can_be_run({"sliding_window": 8})


def test_equal_layers_are_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once in a process: two groups of layers have a builder each."""
    ran: list[Any] = []
    monkeypatch.setattr(warming, "_warm", set())
    monkeypatch.setattr(warming, "outside_pools", lambda device, work: ran.append(work.args[0]))
    layers = [attention(Noting()) for _ in range(3)]
    other = attention(Noting(), logits_soft_cap=20.0)
    gpu: Any = SimpleNamespace(type="cuda")
    warming.warm_up(layers, CONFIG, 1, PAGE, gpu)
    warming.warm_up([*layers, other], CONFIG, 1, PAGE, gpu)
    assert ran == [layers[-1], other]


def test_nothing_is_run_where_nothing_is_compiled() -> None:
    provider = Noting()
    warming.warm_up([attention(provider)], CONFIG, 1, PAGE, CPU)
    assert not provider.attended
    assert not provider.stored
