"""The features of vLLM over packed pages: capacity, and the same text whatever the scheduler does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from .conftest import CACHE_BYTES, PAGE, TEXT, Engines, Run, disagreement, drift
from .models import IDS, RANDOM, model

PROMPTS = [TEXT[:600], TEXT[1000:1400], "The Congress shall have", TEXT[3000:3040]]
LAYERS, KV_HEADS, HEAD_DIM = 4, 2, 64
SHORT = [TEXT[start : start + 60] for start in range(0, 1400, 100)]
PACKED = {"prefill": "packed"}
"""Prompts attend to the pages: what an answer is must not depend on how a prompt was cut or cached."""
WHOLE: dict[str, Any] = {"max_num_batched_tokens": 2048, "enable_prefix_caching": False}
FEW: dict[str, Any] = {"max_model_len": 512, "num_gpu_blocks_override": 17}
"""Of these blocks, the requests of SHORT need more than there are."""
FEWER: dict[str, Any] = {"max_model_len": 352, "num_gpu_blocks_override": 12}
"""The same where chunks keep requests from starting together."""
NGRAMS: dict[str, Any] = {"method": "ngram", "prompt_lookup_max": 3, "prompt_lookup_min": 1}
PACKINGS: dict[str, dict[str, Any]] = {
    "equal": {},
    "uncompressed boundary": {"bits": 3, "boundary_layers": 1, "layers": {"1": {"k_bits": 3.5, "v_bits": 2}}},
    "wider boundary": {"k_bits": 3, "v_bits": 2, "boundary_layers": 1, "boundary": {"k_bits": 4, "v_bits": "raw"}},
    "a width a layer": {"layers": {str(layer): {"k_bits": bits} for layer, bits in enumerate((2, 2.5, 3.5, 4))}},
    "raw prompts": {"bits": 3, "boundary_layers": 1, "prefill": "raw"},
}
"""Options that give layers pages of several sizes, beside those that do not."""


def packings(*names: str, slow: tuple[str, ...] = ()) -> pytest.MarkDecorator:
    """Run a test with the fixture ``packing`` over :data:`PACKINGS` of ``names``, and of ``slow`` on request."""
    on_request = [pytest.param(name, marks=pytest.mark.slow) for name in slow]
    return pytest.mark.parametrize("packing", [*names, *on_request], indirect=True, scope="module")


OVER_UNEQUAL_PAGES = packings("equal", "uncompressed boundary", "wider boundary", slow=("a width a layer",))


def blocks(token_bytes: int, layers: int = LAYERS, *, others: int = 0) -> int:
    """Blocks that fit: ``layers`` of ``token_bytes`` a token and head, ``others`` in float32."""
    return CACHE_BYTES // (PAGE * KV_HEADS * (layers * token_bytes + others * 2 * HEAD_DIM * 4))


@pytest.fixture(scope="module")
def uncompressed(engines: Engines) -> Run:
    return engines([PROMPTS], **WHOLE)


@pytest.fixture(scope="module")
def plain(engines: Engines) -> Run:
    return engines([PROMPTS, SHORT], PACKED, **WHOLE)


@dataclass(frozen=True)
class Packing:
    """Options, and what an engine with them answers to PROMPTS and to SHORT when nothing interferes."""

    options: dict[str, Any]
    plain: Run


@pytest.fixture(scope="module")
def packing(request: pytest.FixtureRequest, engines: Engines, plain: Run) -> Packing:
    chosen = PACKINGS[request.param]
    options = {**PACKED, **chosen}
    return Packing(options, engines([PROMPTS, SHORT], options, **WHOLE) if chosen else plain)


def test_without_the_backend_nothing_changes(uncompressed: Run) -> None:
    assert uncompressed.blocks == blocks(2 * HEAD_DIM * 4)


def test_four_bits(plain: Run, uncompressed: Run) -> None:
    assert plain.blocks == blocks(68)
    assert drift(uncompressed.passes[0], plain.passes[0]) < 0.3
    assert disagreement(uncompressed.passes[0], plain.passes[0]) < 0.5


@pytest.mark.parametrize(
    ("options", "token_bytes", "nats"),
    [
        ({"bits": 3}, 52, 0.7),
        ({"bits": 2}, 36, 1.0),
        pytest.param({"bits": 3.5}, 60, 0.6, marks=pytest.mark.slow),
        pytest.param({"v_bits": "raw"}, 34 + 256, 0.3, marks=pytest.mark.slow),
    ],
)
def test_other_widths(
    engines: Engines, uncompressed: Run, options: dict[str, Any], token_bytes: int, nats: float
) -> None:
    run = engines([PROMPTS], {**PACKED, **options}, max_tokens=1, **WHOLE)
    assert run.blocks == blocks(token_bytes)
    assert drift(uncompressed.passes[0], run.passes[0]) < nats


@pytest.mark.slow
def test_the_environment_sets_the_bits(engines: Engines) -> None:
    run = engines([["We"]], {}, environment={"TURBOQUANT_BITS": "3", "TURBOQUANT_COMPRESS_V": "0"}, max_tokens=1)
    assert run.blocks == blocks(26 + 256)


def test_layers_of_their_own(engines: Engines, uncompressed: Run) -> None:
    options = {**PACKED, "boundary_layers": 1, "layers": {"1": {"k_bits": 3, "v_bits": 2}}}
    run = engines([PROMPTS], options, max_tokens=1, **WHOLE)
    assert run.blocks == blocks((26 + 18) + 68, 1, others=2)
    assert drift(uncompressed.passes[0], run.passes[0]) < 0.7


def test_all_layers_uncompressed_is_vllm_itself(engines: Engines, uncompressed: Run) -> None:
    run = engines([PROMPTS], {"boundary_layers": 2}, **WHOLE)
    assert run.blocks == uncompressed.blocks
    assert run.tokens() == uncompressed.tokens()


@OVER_UNEQUAL_PAGES
def test_cached_prefixes_and_chunks_change_nothing(engines: Engines, packing: Packing) -> None:
    run = engines([PROMPTS, PROMPTS], packing.options, max_num_batched_tokens=64)
    assert all(output["cached"] > 60 for output in run.passes[1][:2])
    assert run.tokens(0) == run.tokens(1) == packing.plain.tokens()


def test_raw_prompts_stay_within_the_error_of_packing(engines: Engines, uncompressed: Run) -> None:
    whole = engines([PROMPTS], {}, **WHOLE)
    cut = engines([PROMPTS, PROMPTS], {}, max_num_batched_tokens=64)
    for run in (cut.passes[0], cut.passes[1], uncompressed.passes[0]):
        assert disagreement(whole.passes[0], run) < 0.5


@OVER_UNEQUAL_PAGES
def test_preempted_requests_resume_where_they_were(engines: Engines, packing: Packing) -> None:
    run = engines([SHORT], packing.options, **{**WHOLE, **FEW})
    assert run.preemptions
    assert run.tokens() == packing.plain.tokens(1)


@pytest.mark.parametrize("drafts", [3, pytest.param(1, marks=pytest.mark.slow)])
@packings("equal", "uncompressed boundary", slow=("wider boundary", "a width a layer", "raw prompts"))
def test_speculation_changes_nothing(fresh_engines: Engines, packing: Packing, drafts: int) -> None:
    speculative = {**NGRAMS, "num_speculative_tokens": drafts}
    run = fresh_engines.unless_vllm_fails([PROMPTS], packing.options, speculative_config=speculative, **WHOLE)
    assert run.accepted
    assert run.tokens() == packing.plain.tokens()


@pytest.mark.slow
@OVER_UNEQUAL_PAGES
def test_everything_at_once_changes_nothing(fresh_engines: Engines, packing: Packing) -> None:
    """Drafts, of chunks and cached prefixes, of requests that are preempted."""
    at_once = {**FEWER, "max_num_batched_tokens": 64, "speculative_config": {**NGRAMS, "num_speculative_tokens": 3}}
    run = fresh_engines.unless_vllm_fails([SHORT, PROMPTS, PROMPTS], packing.options, **at_once)
    assert run.accepted
    assert run.preemptions
    assert any(output["cached"] > 60 for output in run.passes[2])
    assert run.tokens(0) == packing.plain.tokens(1)
    assert run.tokens(1) == run.tokens(2) == packing.plain.tokens(0)


@packings("equal", slow=("uncompressed boundary", "wider boundary", "a width a layer"))
def test_a_batch_of_mixed_lengths_is_its_requests_one_by_one(engines: Engines, packing: Packing) -> None:
    prompts = [
        TEXT[start : start + length] for start, length in zip(range(0, 1200, 200), range(10, 850, 140), strict=True)
    ]
    run = engines(
        [prompts, *([prompt] for prompt in prompts)], packing.options, max_num_batched_tokens=128, max_tokens=8
    )
    assert run.tokens(0) == [run.tokens(1 + index)[0] for index in range(len(prompts))]


@pytest.mark.slow
def test_the_engine_in_its_own_processes(engines: Engines, plain: Run) -> None:
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    run = engines([PROMPTS], PACKED, environment=environment, **WHOLE)
    assert run.blocks == plain.blocks
    assert run.tokens() == plain.tokens()


def test_the_start_line(engines: Engines, plain: Run) -> None:
    log = engines.log.read_text()
    assert (
        "FUSED_TURBOQUANT: 4 of 4 layers: keys 4 bits, values 4 bits, 68 bytes a token and head instead of 512" in log
    )
    assert "7.53 times the blocks of the model's dtype; kernels: reference (for checking only: no GPU)" in log
    assert "prompts attend to packed pages; refused: MLA, ALiBi" in log


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bit": 3}, "unknown turboquant option 'bit'; the options are bits, boundary"),
        ({"bits": 8}, "turboquant.bits is 8; it must be one of"),
        ({"layers": {"9": "uncompressed"}}, "turboquant.layers names layer 9; the model has layers -4 to 3"),
        ({"provider": "nobody"}, "kernel provider 'nobody' is not installed"),
    ],
)
def test_bad_options_stop_the_start(engines: Engines, options: dict[str, Any], message: str) -> None:
    assert message in engines.refusal(options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kv_cache_dtype": "fp8"}, "packed pages replace the KV cache type 'fp8'"),
        ({"kv_sharing_fast_prefill": True}, "--kv-sharing-fast-prefill does not work over packed pages"),
    ],
)
def test_what_vllm_would_do_otherwise_is_refused(engines: Engines, arguments: dict[str, Any], message: str) -> None:
    assert message in engines.refusal({}, **arguments)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("position biases", "ALiBi slopes are not supported over packed pages"),
        ("latent", "latent attention keeps no keys that could be packed"),
    ],
)
def test_other_attention_is_refused(engines: Engines, tmp_path: Path, kind: str, message: str) -> None:
    assert message in engines.refusal({}, model=model(tmp_path, kind), **RANDOM)


def test_fp8_scales_of_a_checkpoint_are_refused_unless_another_cache_type_is_chosen(
    engines: Engines, tmp_path: Path
) -> None:
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    scales = {"quant_method": "compressed-tensors", "format": "dense", "config_groups": {}, "ignore": []}
    fp8 = model(tmp_path, "plain", quantization_config={**scales, "kv_cache_scheme": scheme})
    message = (
        "the KV cache type 'fp8', which --kv-cache-dtype or the checkpoint asks for: pass --kv-cache-dtype bfloat16"
    )
    assert message in engines.refusal({}, model=fp8, **RANDOM)
    # In float32, vLLM's own attention on a CPU is far off over a cache in bfloat16.
    chosen = {**RANDOM, "dtype": "bfloat16", "kv_cache_dtype": "bfloat16"}
    own, raw = engines([IDS], model=fp8, **chosen), engines([IDS], {}, model=fp8, **chosen)
    assert drift(own.passes[0], raw.passes[0]) < 0.02


def test_sizes_without_a_rotation_are_refused(engines: Engines, tmp_path: Path) -> None:
    refusal = engines.refusal({}, model=model(tmp_path, "plain", head_dim=36), **RANDOM)
    assert "head_dim is 36; packed are multiples of 8 up to 1024" in refusal


@pytest.mark.slow
def test_native_cache_types_are_taken_over_on_request(tmp_path: Path) -> None:
    llama = model(tmp_path, "plain", num_hidden_layers=8)
    taking = Engines(tmp_path / "log", TURBOQUANT_OVERRIDE_NATIVE="1")
    full = taking([IDS], model=llama, **RANDOM)
    packed = taking([IDS], model=llama, kv_cache_dtype="turboquant_4bit_nc", **RANDOM)
    refusal = taking.refusal(model=llama, kv_cache_dtype="turboquant_k8v4", **RANDOM)
    taking.close()
    # vLLM leaves the first and last two layers uncompressed: 4 layers of 36 bytes and 4 of 256.
    assert packed.blocks / full.blocks == pytest.approx(8 * 256 / (4 * 36 + 4 * 256), rel=0.01)
    assert drift(full.passes[0], packed.passes[0]) < 1e-4
    assert "cache type turboquant_k8v4 has no counterpart in packed pages" in refusal
