"""Static pages and the Triton kernels: compiled steps and CUDA graphs on a GPU, compiled steps in the interpreter.

Needs a CUDA device, or ``TRITON_INTERPRET=1``; ``test_static.py`` runs it in the interpreter.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM

from turboquant_core import available_providers
from turboquant_hf import TurboQuantCache, TurboQuantStaticCache, patch_model
from turboquant_hf.compat import CACHE_ARGUMENT

triton_provider = pytest.importorskip("turboquant_triton")
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.float16 if ON_GPU else torch.float32
ROOM, PROMPT, STEPS, PADDING = 64, 21, 8, 5
if not ON_GPU:
    # The interpreter takes seconds for what a GPU does in microseconds.
    ROOM, PROMPT, STEPS, PADDING = 16, 9, 2, 3
OPTIONS: dict[str, dict[str, Any]] = {"plain": {}, "windows": {"sink_tokens": 2, "recent_tokens": 6}}

pytestmark = [
    pytest.mark.skipif(
        not ON_GPU and os.environ.get("TRITON_INTERPRET") != "1", reason="needs CUDA or the interpreter"
    ),
    # The interpreter computes with NumPy, which warns of infinities where a GPU goes on.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    # Compilers warn of their own deprecated parts.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.fixture(autouse=True)
def _provider(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The provider, found where nothing is installed too."""
    torch.compiler.reset()
    counters.clear()
    if "triton" not in available_providers():
        provider = triton_provider.TritonProvider()

        def select(request: Any, name: str | None = None) -> Any:
            assert provider.unsupported_reason(request) is None
            return provider

        monkeypatch.setattr("turboquant_hf.packed_layer.select_provider", select)
    yield
    torch.compiler.reset()


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(
        **sizes,
        num_hidden_layers=2 if ON_GPU else 1,
        head_dim=64,
        vocab_size=97,
        eos_token_id=None,
        pad_token_id=0,
        bos_token_id=1,
    )
    model = LlamaForCausalLM(config).to(DEVICE, DTYPE).eval()
    patch_model(model, verify=False, provider="triton")
    return model


class Run:
    """A left-padded batch of two, fed to a cache token by token from buffers that keep their place."""

    def __init__(self, model: Any, cache: Any, is_static: bool) -> None:
        self.model, self.cache, self.is_static = model, cache, is_static
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(2, 97, (2, PROMPT + STEPS), generator=generator).to(DEVICE)
        self.mask = torch.ones(2, ROOM, dtype=torch.long, device=DEVICE)
        self.mask[1, :PADDING] = 0
        self.token = self.ids[:, :1].clone()
        self.position = torch.zeros_like(self.token)
        self.first = torch.tensor([[0], [PADDING]], device=DEVICE)

    @torch.no_grad()
    def prompt(self) -> torch.Tensor:
        self.cache.note_padding(self.mask[:, :PROMPT])
        positions = (torch.arange(PROMPT, device=DEVICE) - self.first).clamp(min=0)
        return self._call(self.model, self.ids[:, :PROMPT], self.mask[:, :PROMPT], positions)

    @torch.no_grad()
    def place(self, step: int) -> None:
        at = PROMPT + step
        self.token.copy_(self.ids[:, at : at + 1])
        self.position.copy_(at - self.first)

    @torch.no_grad()
    def step(self, step: int, call: Any = None) -> torch.Tensor:
        self.place(step)
        mask = self.mask if self.is_static else self.mask[:, : PROMPT + step + 1]
        return self._call(call or self.model.forward, self.token, mask, self.position)

    def _call(self, call: Any, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        out = call(ids, attention_mask=mask, position_ids=positions, use_cache=True, **{CACHE_ARGUMENT: self.cache})
        return out.logits.float().clone()


def runs(model: Any, options: dict[str, Any]) -> tuple[Run, Run]:
    options = {"page_size": 16, "provider": "triton", "recent_tokens": 0, **options}
    growing = TurboQuantCache(model.config, **options)
    return Run(model, growing, False), Run(model, TurboQuantStaticCache(model.config, ROOM, **options), True)


def check(got: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = 2e-2 if ON_GPU else 1e-4
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_compiled_steps(model: Any, options: dict[str, Any]) -> None:
    """On a GPU by inductor, in CUDA graphs; elsewhere traced to operators."""
    growing, static = runs(model, options)
    growing.prompt(), static.prompt()
    settings: dict[str, Any] = {"mode": "reduce-overhead"} if ON_GPU else {"backend": "aot_eager"}
    compiled = torch.compile(model.forward, fullgraph=True, dynamic=False, **settings)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(STEPS):
            check(static.step(step, compiled), growing.step(step))
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["inductor"]["cudagraph_skips"]
    assert {layer.path for layer in static.cache.summary().layers} == {"fused"}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_step_is_few_operators(model: Any, options: dict[str, Any]) -> None:
    """What is none of a layer's own operators is arithmetic that a compiler fuses; each launch costs microseconds."""
    _, static = runs(model, options)
    static.prompt()
    seen: Counter[str] = Counter()

    def note(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        for node in graph.graph.nodes:
            # Those that write in place are arguments of a functional form.
            operator = str(node.args[0] if "auto_functionalized" in str(node.target) else node.target)
            if operator.startswith("turboquant"):
                seen[operator] += 1
        return make_boxed_func(graph.forward)

    static.step(0, torch.compile(model.forward, fullgraph=True, dynamic=False, backend=aot_autograd(fw_compiler=note)))
    each = {"turboquant_core.require_before.default": 2, "turboquant_triton.store.default": 1}
    each |= {"turboquant_triton.attend.default": 1}
    if options:
        each |= {"turboquant_triton.add_tokens.default": 1}
    assert seen == {name: count * model.config.num_hidden_layers for name, count in each.items()}


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="records a CUDA graph")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_recorded_step(model: Any, options: dict[str, Any]) -> None:
    """One step recorded without a compiler and replayed for every token."""
    growing, static = runs(model, options)
    growing.prompt(), static.prompt()
    length = static.cache.get_seq_length().clone()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        static.step(0)
    torch.cuda.current_stream().wait_stream(stream)
    static.cache.crop(-1)
    static.place(0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = static._call(model.forward, static.token, static.mask, static.position)
    assert torch.equal(static.cache.get_seq_length(), length)  # recorded, not run
    for step in range(STEPS):
        static.place(step)
        graph.replay()
        check(logits, growing.step(step))


def test_generate(model: Any) -> None:
    """Compiles by itself on a GPU."""
    growing, static = runs(model, {})
    mask = static.mask[:, :PROMPT]
    arguments: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": STEPS, "do_sample": False}
    ids = static.ids[:, :PROMPT]
    first = model.generate(ids, **{CACHE_ARGUMENT: growing.cache}, **arguments)
    for _ in range(2 if ON_GPU else 1):
        static.cache.reset()
        assert torch.equal(model.generate(ids, **{CACHE_ARGUMENT: static.cache}, **arguments), first)
