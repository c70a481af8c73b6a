"""What packed pages do not serve is refused by name when vLLM builds the layer, which is before weights are read.

Layers and configurations are vLLM's own; no engine runs. Whole engines that are refused are tested beside those that
are served.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from turboquant_core import ProviderError
from turboquant_vllm import register
from turboquant_vllm.errors import OptionError, UnsupportedError
from turboquant_vllm.limits import ELSEWHERE
from turboquant_vllm.options import _READERS, CONFIG_KEY

from .conftest import BACKEND, TINY

with warnings.catch_warnings():
    # vLLM's imports, and torch's of its compiler, use what is deprecated.
    warnings.simplefilter("ignore")
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs

    register()
    from vllm.model_executor.layers.attention.attention import Attention

    from turboquant_vllm.backend import FusedTurboQuantBackend

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 64
Build = Callable[..., Any]


def config(**arguments: Any) -> VllmConfig:
    """Of an engine over the small model."""
    chosen = {"attention_backend": BACKEND, "dtype": "float32", "max_model_len": 512, **arguments}
    return EngineArgs(model=str(TINY), skip_tokenizer_init=True, **chosen).create_engine_config()


@pytest.fixture(autouse=True)
def single_precision() -> Iterator[None]:
    """vLLM builds layers while the model's dtype is torch's default."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def build() -> Build:
    def layer(kind: Any, engine: VllmConfig | None = None, head_dim: int = HEAD_DIM, **arguments: Any) -> Any:
        engine = engine or config()
        place = {
            "num_kv_heads": KV_HEADS,
            "cache_config": engine.cache_config,
            "prefix": "model.layers.1.self_attn.attn",
        }
        with set_current_vllm_config(engine):
            return kind(HEADS, head_dim, head_dim**-0.5, **{**place, **arguments})

    return layer


def kind(module: str, name: str) -> Any:
    """A class of vLLM's attention layers; skips where this release does not have it."""
    try:
        return getattr(importlib.import_module(f"vllm.model_executor.layers.attention.{module}"), name)
    except ImportError:
        pytest.skip(f"this vLLM has no {name}")


def test_a_plain_layer_is_packed(build: Build) -> None:
    assert build(Attention).impl.setup.bits.k_bits == 4


def test_custom_is_this_backend_where_nobody_else_has_it(build: Build) -> None:
    engine = config(attention_backend="CUSTOM", additional_config={CONFIG_KEY: {"layers": {"1": "uncompressed"}}})
    assert not hasattr(build(Attention, engine).impl, "setup")
    assert build(Attention, engine, prefix="model.layers.2.self_attn.attn").impl.setup.bits.k_bits == 4


@pytest.mark.parametrize(
    ("module", "name", "arguments", "message"),
    [
        ("cross_attention", "CrossAttention", {}, "attention type .*ENCODER_DECODER not supported"),
        ("encoder_only_attention", "EncoderOnlyAttention", {}, "attention type .*ENCODER_ONLY not supported"),
        ("chunked_local_attention", "ChunkedLocalAttention", {"attention_chunk_size": 32}, "ChunkedLocalAttention"),
        ("prefill_prefix_lm_attention", "PrefillPrefixLMAttention", {}, "is a PrefillPrefixLMAttention"),
        ("static_sink_attention", "StaticSinkAttention", {"sink_len": 16}, "is a StaticSinkAttention"),
        ("rswa_attention", "RSWAAttention", {"rswa_window": 16}, "is a RSWAAttention"),
    ],
)
def test_other_kinds_of_layers(build: Build, module: str, name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((UnsupportedError, ValueError), match=message) as refused:
        build(kind(module, name), **arguments)
    assert ELSEWHERE in str(refused.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"head_size_v": 32}, "has keys of 64 and values of 32 coordinates; packed pages serve equal sizes"),
        ({"alibi_slopes": [1.0, 0.5, 0.25, 0.125]}, "ALiBi slopes are not supported over packed pages"),
        ({"fancy_scores": True}, "this model's attention takes fancy_scores, not supported here"),
        ({"head_dim": 36}, "head_dim is 36; packed are multiples of 8 up to 1024 that have a Hadamard matrix"),
        ({"head_dim": 184}, "head_dim is 184; packed are multiples of 8"),
        ({"head_dim": 1032}, "head_dim is 1032; packed are multiples of 8"),
    ],
)
def test_arguments_of_a_layer(build: Build, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((UnsupportedError, ValueError), match=message) as refused:
        build(Attention, **arguments)
    assert ELSEWHERE in str(refused.value)


def test_layers_left_out_of_a_cache_type(build: Build) -> None:
    with pytest.raises(UnsupportedError, match=r"--kv-cache-dtype-skip-layers leaves out .* turboquant\.layers"):
        build(Attention, config(kv_cache_dtype_skip_layers=["0"]))


@pytest.mark.parametrize("cache_type", ["fp8", "fp8_e4m3", "fp8_e5m2"])
def test_cache_types_of_vllm(build: Build, cache_type: str) -> None:
    message = f"packed pages replace the KV cache type '{cache_type}', .* pass --kv-cache-dtype bfloat16"
    with pytest.raises(ValueError, match=message):
        build(Attention, config(kv_cache_dtype=cache_type))


def test_single_precision_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.platforms.cpu.CpuPlatform.is_cpu", lambda self: False)
    reason = FusedTurboQuantBackend.supports_combination(HEAD_DIM, torch.float32, "auto", 16, False, False, False, None)
    assert reason == "dtype is torch.float32; packed pages on a GPU serve float16 and bfloat16: pass --dtype bfloat16"
    assert not FusedTurboQuantBackend.supports_dtype(torch.float64)
    assert FusedTurboQuantBackend.supports_dtype(torch.bfloat16)


def test_batch_invariance(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    with pytest.raises(ValueError, match="batch invariance not supported"):
        build(Attention)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        (
            "decode_context_parallel_size",
            2,
            "decode_context_parallel_size is 2; packed pages|DCP not supported",
        ),
        (
            "prefill_context_parallel_size",
            2,
            "prefill_context_parallel_size is 2; packed pages|PCP not supported",
        ),
        ("enable_dbo", True, "--enable-dbo"),
    ],
)
def test_ways_to_run_a_step(build: Build, name: str, size: Any, message: str) -> None:
    """Set after vLLM's own checks, which refuse some of them on a CPU before a layer is built."""
    engine = config()
    object.__setattr__(engine.parallel_config, name, size)
    with pytest.raises((UnsupportedError, ValueError), match=message):
        build(Attention, engine)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"TURBOQUANT_BITS": "8"}, "TURBOQUANT_BITS is 8.0; it must be one of"),
        ({"TURBOQUANT_BITS": "four"}, "TURBOQUANT_BITS is 'four'; it must be one of"),
        ({"TURBOQUANT_COMPRESS_V": "no"}, "TURBOQUANT_COMPRESS_V is 'no'; it must be 0 or 1"),
        ({"TURBOQUANT_PROVIDER": "nobody"}, "kernel provider 'nobody' is not installed"),
    ],
)
def test_variables_of_the_environment(
    build: Build, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises((OptionError, ProviderError), match=message):
        build(Attention)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 8}, "turboquant.bits is 8; it must be one of"),
        ({"k_bits": "raw"}, "turboquant.k_bits is 'raw'"),
        ({"v_bits": 16}, "turboquant.v_bits is 16"),
        ({"compress_v": 1}, "turboquant.compress_v is 1; it must be true or false"),
        ({"boundary_layers": 1.5}, "turboquant.boundary_layers is 1.5"),
        ({"boundary": "raw"}, "turboquant.boundary is 'raw'"),
        ({"layers": {"4": "uncompressed"}}, "turboquant.layers names layer 4; the model has layers -4 to 3"),
        ({"layers": {"3": {"k_bits": 2}, "-1": {"k_bits": 3}}}, "turboquant.layers names layer 3 of 4 as 3 and as -1"),
        ({"prefill": "exact"}, "turboquant.prefill is 'exact'"),
        ({"key_scale": "best"}, "turboquant.key_scale is 'best'"),
        ({"value_scale": None}, "turboquant.value_scale is None"),
        ({"key_centers": "no such file"}, "turboquant.key_centers is 'no such file', which is no file"),
        ({"preset": "no such file"}, "turboquant.preset is 'no such file', which is no file"),
        ({"sink_tokens": True}, "turboquant.sink_tokens is True"),
        ({"recent_tokens": -4}, "turboquant.recent_tokens is -4"),
        ({"seed": "x"}, "turboquant.seed is 'x'"),
        ({"provider": "nobody"}, "kernel provider 'nobody' is not installed"),
        ({"shaped": True}, "turboquant.shaped: the plug-in has no shaped codes"),
        ({"widths": 4}, "unknown turboquant option 'widths'; the options are"),
        ("4 bits", r"additional_config\['turboquant'\] is '4 bits'; it must be an object"),
    ],
)
def test_options_that_reach_a_layer(build: Build, options: Any, message: str) -> None:
    with pytest.raises((OptionError, ProviderError), match=message):
        build(Attention, config(additional_config={CONFIG_KEY: options}))


def test_no_option_is_left_out_above() -> None:
    """A new option needs a line in the test before."""
    (marker,) = (mark for mark in test_options_that_reach_a_layer.pytestmark if mark.name == "parametrize")
    tried = {name for options, _ in marker.args[1] if isinstance(options, dict) for name in options}
    assert set(_READERS) <= tried
