"""The static packed cache against the growing one: the same logits, in one graph."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig, Gemma2Config, MistralConfig

from turboquant_core import CacheCodec, TurboQuantError
from turboquant_hf import TurboQuantCache, TurboQuantStaticCache, packed_layer, patch_model, turboquant, unpatch_model
from turboquant_hf.compat import CACHE_ARGUMENT
from turboquant_hf.prompts import is_watched

from .conftest import CONFIGS, GQA, UNTOUCHED, VOCABULARY, build
from .sweep.shrink import small_model

ROOM = 64
WINDOWS = {"sink_tokens": 2, "recent_tokens": 6}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "windows": WINDOWS,
    "start-after": {"start_after": 30, "recent_tokens": 3},
    "raw-values": {"compress_v": False, "bits": 3},
    "centred": {"center_keys": True},
}
MISTRAL = MistralConfig(**GQA, sliding_window=8)
GEMMA2 = Gemma2Config(**GQA, sliding_window=8, query_pre_attn_scalar=20)
# Transformers 5.5 makes Falcon's mask by torch.vmap, which warns while it is traced.
VMAP = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
INDUCTOR = [
    pytest.mark.slow,
    # It imports torch's own deprecated parts.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
BACKENDS = ["eager", "aot_eager", pytest.param("inductor", marks=INDUCTOR)]


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch.compiler.reset()
    counters.clear()


def pair(model: Any, room: int = ROOM, **options: Any) -> tuple[TurboQuantCache, TurboQuantStaticCache]:
    options = {"page_size": 16, "recent_tokens": 0, "center_keys": False, **options}
    return TurboQuantCache(model.config, **options), TurboQuantStaticCache(model.config, room, **options)


def token_ids(batch: int, tokens: int, seed: int = 5) -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def steps(
    model: Any,
    cache: Any,
    widths: list[int],
    padding: int = 0,
    room: int | None = None,
    run: Callable[..., Any] | None = None,
) -> list[torch.Tensor]:
    """Logits of a batch of two, the second sequence left-padded, fed in pieces of ``widths`` tokens.

    ``run`` takes every piece after the first; ``room`` gives masks that width, as a compiled step wants.
    """
    ids = token_ids(2, sum(widths))
    mask = torch.ones(2, room or sum(widths), dtype=torch.long)
    mask[1, :padding] = 0
    logits, start = [], 0
    for width in widths:
        stop = start + width
        shown = mask if room and start else mask[:, :stop]
        positions = (mask[:, :stop].cumsum(-1) - 1).clamp(min=0)[:, start:].contiguous()
        call = run if run is not None and start else model
        out = call(
            ids[:, start:stop], attention_mask=shown, position_ids=positions, use_cache=True, **{CACHE_ARGUMENT: cache}
        )
        logits.append(out.logits[:, :, :].clone())
        start = stop
    return logits


def check_equal(got: list[torch.Tensor], expected: list[torch.Tensor], padding: int, tolerance: float = 1e-4) -> None:
    """Logits of padding itself say nothing."""
    got, expected = ([x[0] for x in run] + [run[0][1, padding:]] + [x[1] for x in run[1:]] for run in (got, expected))
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


def generate(model: Any, ids: torch.Tensor, cache: Any, **options: Any) -> torch.Tensor:
    torch.manual_seed(0)
    arguments: dict[str, Any] = {"max_new_tokens": 10, "do_sample": True, "top_k": 50, "pad_token_id": 0, **options}
    return model.generate(ids, **{CACHE_ARGUMENT: cache}, **arguments)


def compile_config(backend: str) -> CompileConfig:
    config = CompileConfig(fullgraph=True, backend=backend, mode=None, dynamic=False)
    config._compile_all_devices = True
    return config


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("padding", [0, 5])
def test_logits_of_every_kind_of_step(llama: Any, options: dict[str, Any], padding: int) -> None:
    patch_model(llama, verify=False)
    runs = [steps(llama, cache, [21, 1, 1, 3, 1, 18, 1], padding) for cache in pair(llama, **options)]
    check_equal(runs[1], runs[0], padding)


def test_every_family(model: Any) -> None:
    patch_model(model, verify=False)
    growing, static = pair(model)
    check_equal(steps(model, static, [21, 1, 2, 1], 5), steps(model, growing, [21, 1, 2, 1], 5), 5)
    for one, other in zip(static.summary().layers, growing.summary().layers, strict=True):
        assert (one.path, one.bits) == (other.path, other.bits)


def test_untouched_models_are_intercepted(falcon: Any, llama: Any) -> None:
    for model in (falcon, llama):
        growing, static = pair(model)
        check_equal(steps(model, static, [21, 1, 1], 5), steps(model, growing, [21, 1, 1], 5), 5)
        # Transformers 5.5 repeats grouped heads where there is a mask.
        assert static.summary().layers[0].path == growing.summary().layers[0].path


@pytest.mark.parametrize("options", [{}, {"recent_tokens": 4}], ids=["plain", "recent"])
@pytest.mark.parametrize("config", [MISTRAL, GEMMA2], ids=["mistral", "gemma2"])
def test_sliding_windows(config: Any, options: dict[str, Any]) -> None:
    """Pages are written over: 8 + 16 tokens of room, and chunks beyond it."""
    model = build(config, "eager" if config is GEMMA2 else "sdpa")
    patch_model(model, verify=False, compress_sliding=True)
    caches = pair(model, 128, compress_sliding=True, **options)
    runs = [steps(model, cache, [40, 1, 5, 1, 30, 1, 1, 16, 1], 3) for cache in caches]
    check_equal(runs[1], runs[0], 3)
    pages = [layer.packed_sequences.pages.shape[0] for layer in caches[1].layers if layer.is_sliding]
    assert set(pages) == {2 * 2}


@pytest.fixture
def nearest_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Searched codes that are equally good are chosen between by rounding, which a compiler changes."""
    create = partial(CacheCodec.create, key_scale="unbiased", value_scale="unbiased")
    monkeypatch.setattr(packed_layer, "CacheCodec", SimpleNamespace(create=create))


@pytest.mark.usefixtures("nearest_codes")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, WINDOWS, {"compress_v": False}], ids=["plain", "windows", "raw-values"])
def test_one_graph_for_all_steps(llama: Any, backend: str, options: dict[str, Any]) -> None:
    patch_model(llama, verify=False)
    growing, static = pair(llama, **options)
    if options is WINDOWS:
        static.note_padding(torch.tensor([[1] * 21, [0] * 5 + [1] * 16]))
    compiled = torch.compile(llama.forward, backend=backend, fullgraph=True, dynamic=False)
    with torch._dynamo.config.patch(error_on_recompile=True):
        got = steps(llama, static, [21, *[1] * 9], 5, room=ROOM, run=compiled)
    # Inductor rounds in another order, so that a coordinate between two levels may take the other code.
    tolerance = 2e-2 if backend == "inductor" else 1e-4
    check_equal(got, steps(llama, growing, [21, *[1] * 9], 5), 5, tolerance)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert {layer.path for layer in static.summary().layers} == {"fused"}
    assert {layer.calls for layer in static.summary().layers} == {0}


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "llama-eager", "mistral-sliding", "phi3", "qwen3"])
def test_families_in_one_graph(name: str) -> None:
    model = build(*({"mistral-sliding": (MISTRAL, "sdpa")} | CONFIGS)[name])
    patch_model(model, verify=False, compress_sliding=True)
    growing, static = pair(model, compress_sliding=True)
    compiled = torch.compile(model.forward, backend="aot_eager", fullgraph=True, dynamic=False)
    with torch._dynamo.config.patch(error_on_recompile=True):
        got = steps(model, static, [21, *[1] * 8], 5, room=ROOM, run=compiled)
    check_equal(got, steps(model, growing, [21, *[1] * 8], 5), 5)
    assert {layer.path for layer in static.summary().layers} == {"fused"}


@VMAP
def test_an_untouched_model_in_one_graph() -> None:
    """Interception works while a graph is traced, of grouped heads too, which the model repeats."""
    for config, attention, path in (
        (UNTOUCHED["falcon"], "sdpa", "intercepted"),
        (CONFIGS["llama"][0], "sdpa", "intercepted"),
        (CONFIGS["llama"][0], "eager", "decoded"),
    ):
        model = build(config, attention)
        growing, static = pair(model)
        compiled = torch.compile(model.forward, backend="eager", fullgraph=True, dynamic=False)
        got = steps(model, static, [21, 1, 1], 5, room=ROOM, run=compiled)
        check_equal(got, steps(model, growing, [21, 1, 1], 5), 5)
        assert {layer.path for layer in static.summary().layers} == {path}


def test_long_chunks_compile_decoded(llama: Any) -> None:
    patch_model(llama, verify=False)
    growing, static = pair(llama)
    compiled = torch.compile(llama.forward, backend="aot_eager", fullgraph=True, dynamic=False)
    got = steps(llama, static, [21, 20, 1], 5, room=ROOM, run=compiled)
    check_equal(got, steps(llama, growing, [21, 20, 1], 5), 5)
    assert static.summary().layers[0].path == "fused+decoded"
    assert static.summary().layers[0].reasons == ("a long chunk of queries over a past (compiled)",)


@pytest.mark.parametrize("backend", BACKENDS)
def test_generate_compiles_by_itself(llama: Any, prompt: torch.Tensor, backend: str) -> None:
    """As Transformers does on a GPU; a cache that is reset keeps its graph."""
    patch_model(llama, verify=False)
    growing, static = pair(llama)
    expected = generate(llama, prompt, growing)
    for _ in range(2):
        static.reset()
        assert torch.equal(generate(llama, prompt, static, compile_config=compile_config(backend)), expected)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("options", [{}, WINDOWS], ids=["plain", "windows"])
@pytest.mark.parametrize(
    "mode",
    [
        {"num_beams": 2, "num_return_sequences": 2, "do_sample": False},
        {"num_return_sequences": 3},
        {"prefill_chunk_size": 6},
        {"prompt_lookup_num_tokens": 3, "eos_token_id": 1, "min_new_tokens": 8},
    ],
    ids=["beams", "sampling", "chunks", "lookup"],
)
def test_modes_of_generate(llama: Any, prompt: torch.Tensor, mode: dict[str, Any], options: dict[str, Any]) -> None:
    patch_model(llama, verify=False)
    growing, static = (generate(llama, prompt, cache, **mode) for cache in pair(llama, **options))
    assert torch.equal(static, growing)


def test_several_turns(llama: Any, prompt: torch.Tensor) -> None:
    patch_model(llama, verify=False)
    growing, static = pair(llama, **WINDOWS)
    said = [prompt, prompt]
    for _ in range(2):
        said = [generate(llama, torch.cat((ids, prompt[:, :4]), 1), cache, max_new_tokens=5)
                for ids, cache in zip(said, (growing, static), strict=True)]  # fmt: skip
        assert torch.equal(*said)


def test_copies_go_their_own_ways(llama: Any, prompt: torch.Tensor) -> None:
    patch_model(llama, verify=False)
    _, static = pair(llama, **WINDOWS)
    with torch.no_grad():
        llama(prompt, **{CACHE_ARGUMENT: static})
        other = copy.deepcopy(static)
        first = llama(prompt[:, :1], **{CACHE_ARGUMENT: static}).logits
        assert int(other.get_seq_length()) == 21
        assert torch.equal(llama(prompt[:, :1], **{CACHE_ARGUMENT: other}).logits, first)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_static_by_name(llama: Any, prompt: torch.Tensor, backend: str) -> None:
    made: list[Any] = []
    with turboquant(llama, page_size=16):
        arguments = {"cache_implementation": "static", "compile_config": compile_config(backend), "pad_token_id": 0}
        out = llama.generate(prompt, **arguments, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
        made.append(out[CACHE_ARGUMENT])
        plain = llama.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(out.sequences, plain)
    assert type(made[0]) is TurboQuantStaticCache
    assert made[0].get_max_length() if hasattr(made[0], "get_max_length") else made[0].max_cache_len >= 28
    with turboquant(llama, page_size=16, max_cache_len=ROOM, verify=False):
        out = llama.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0, return_dict_in_generate=True)
    assert torch.equal(out.sequences, plain)
    assert out[CACHE_ARGUMENT].room == ROOM


def test_patch_model_verifies_static_pages(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = patch_model(llama, bits=(4, 3), max_cache_len=ROOM, page_size=16)
    assert type(cache) is TurboQuantStaticCache
    assert cache.verification is not None
    assert cache.get_seq_length() == 0
    unpatch_model(llama)
    monkeypatch.setattr(
        "turboquant_core.static_sequences.StaticSequences.exact_from_after", lambda self, tokens: self.filled * 0
    )
    with pytest.raises(TurboQuantError, match="relative error"):
        patch_model(llama, max_cache_len=ROOM, page_size=16, recent_tokens=5)
    assert llama.config._attn_implementation == "sdpa"


def test_early_initialization(llama: Any) -> None:
    """The prompt may be compiled too, once the pages are there."""
    patch_model(llama, verify=False)
    growing, static = pair(llama)
    sizes: dict[str, Any] = {"batch_size": 2, "num_heads": 2, "head_dim": 32}
    static.early_initialization(**sizes, dtype=torch.float32, device=torch.device("cpu"))
    compiled = torch.compile(llama.forward, backend="eager", fullgraph=True, dynamic=False)
    got = steps(compiled, static, [21, 1, 1], 0, room=ROOM, run=compiled)
    check_equal(got, steps(llama, growing, [21, 1, 1], 0), 0)


class TestErrors:
    def test_no_room(self, llama: Any, prompt: torch.Tensor) -> None:
        cache = patch_model(llama, verify=False, max_cache_len=24)
        with pytest.raises(ValueError, match="25 tokens do not fit into a static cache with max_cache_len = 24"):
            generate(llama, prompt, cache)
        llama = build(*CONFIGS["llama"])
        cache.reset()
        with torch.no_grad():
            llama(prompt, **{CACHE_ARGUMENT: cache})
            with pytest.raises(ValueError, match="has room for 24 tokens, which 4 more exceed"):
                llama(prompt[:, :4], **{CACHE_ARGUMENT: cache})

    def test_another_mask_in_a_compiled_step(self, llama: Any) -> None:
        patch_model(llama, verify=False)
        _, static = pair(llama)
        compiled = torch.compile(llama.forward, backend="aot_eager", fullgraph=True, dynamic=False)
        ids, mask = token_ids(2, 22), torch.ones(2, ROOM, dtype=torch.long)
        mask[0, 7] = 0
        with torch.no_grad():
            llama(ids[:, :21], attention_mask=mask[:, :21], **{CACHE_ARGUMENT: static})
            with pytest.raises(ValueError, match="needs a mask that is causal with left padding"):
                compiled(ids[:, 21:], attention_mask=mask, **{CACHE_ARGUMENT: static})
            llama(ids[:, 21:], attention_mask=mask, **{CACHE_ARGUMENT: static})
        assert static.summary().layers[0].path == "fused+decoded"

    def test_pages_cannot_be_made_in_a_graph(self, llama: Any, prompt: torch.Tensor) -> None:
        patch_model(llama, verify=False)
        _, static = pair(llama)
        compiled = torch.compile(llama.forward, backend="eager", fullgraph=True)
        with torch.no_grad(), pytest.raises(Exception, match="run the prompt uncompiled, or call early_initialization"):
            compiled(prompt, **{CACHE_ARGUMENT: static})

    @VMAP
    def test_sinks_need_to_know_of_padding(self, prompt: torch.Tensor) -> None:
        model = build(UNTOUCHED["falcon"], "sdpa")
        _, static = pair(model, **WINDOWS)
        compiled = torch.compile(model.forward, backend="eager", fullgraph=True, dynamic=False)
        with pytest.raises(Exception, match=r"call note_padding\(attention_mask\) on it once"):
            steps(model, static, [21, 1], 5, room=ROOM, run=compiled)

    def test_what_is_fixed(self, llama: Any, prompt: torch.Tensor) -> None:
        patch_model(llama, verify=False)
        _, static = pair(llama)
        with torch.no_grad():
            llama(prompt, **{CACHE_ARGUMENT: static})
        with pytest.raises(ValueError, match="cannot repeat each sequence 2 times"):
            static.batch_repeat_interleave(2)
        with pytest.raises(ValueError, match="cannot keep some of the sequences"):
            static.batch_select_indices(torch.tensor([0]))
        with pytest.raises(ValueError, match="cannot be offloaded"):
            static.layers[0].offload()
        for operation in (static.save, static.load):
            with pytest.raises(ValueError, match=r"a static cache cannot (be saved to|load) cache.* TurboQuantCache"):
                operation("cache")
        with torch.no_grad(), pytest.raises(ValueError, match="holds 1 sequences and got 2"):
            llama(token_ids(2, 1), **{CACHE_ARGUMENT: static})
        static.reset()
        generate(llama, prompt, static)
        with pytest.raises(ValueError, match="start a new cache"):
            generate(llama, prompt.flip(1).repeat(1, 2), static)

    @pytest.mark.parametrize("room", [0, 2.5, None, True])
    def test_bad_room(self, llama: Any, room: Any) -> None:
        with pytest.raises(ValueError, match="it must be a number of tokens, at least 1"):
            TurboQuantStaticCache(llama.config, room)

    @pytest.mark.parametrize(
        ("name", "room", "message"),
        [
            ("bloom", ROOM, r"does not run over a cache of fixed room \(RuntimeError: .*leave max_cache_len out"),
            ("xlm", None, r"does not run a left-padded batch, .* \(\w+Error.*verify=False\) skips"),
        ],
    )
    def test_a_model_that_fails_when_it_is_verified_is_left_unpatched(
        self, name: str, room: int | None, message: str
    ) -> None:
        """BLOOM makes its position biases as wide as the mask; XLM asserts the number of its tokens."""
        model = small_model(name).model
        with pytest.raises(TurboQuantError, match=message):
            patch_model(model, max_cache_len=room)
        assert not is_watched(model)
        assert model.config._attn_implementation in ("eager", "sdpa")

    def test_nothing_to_pack(self) -> None:
        with pytest.raises(ValueError, match="use StaticCache for this model, or compress_sliding=True"):
            TurboQuantStaticCache(MISTRAL, ROOM)

    def test_going_back_beyond_a_sliding_window(self) -> None:
        model = build(MISTRAL, "sdpa")
        patch_model(model, verify=False, compress_sliding=True)
        _, static = pair(model, 128, compress_sliding=True)
        steps(model, static, [60])
        static.crop(-10)
        with pytest.raises(RuntimeError, match="cannot go back 20 tokens"):
            static.crop(-20)
        assert not static.layers[0].is_croppable


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_the_triton_kernels_in_their_interpreter() -> None:
    """Triton reads the variable when it is imported: another process."""
    tests = Path(__file__).with_name("test_static_triton.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", str(tests)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tests.parents[3])
    assert done.returncode == 0, done.stdout[-4000:]
    assert "5 passed" in done.stdout
