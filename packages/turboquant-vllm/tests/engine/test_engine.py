"""The features of vLLM over packed pages: capacity, and the same text whatever the scheduler does."""

from __future__ import annotations

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


def blocks(token_bytes: int, layers: int = LAYERS, *, others: int = 0) -> int:
    """Blocks that fit: ``layers`` of ``token_bytes`` a token and head, ``others`` in float32."""
    return CACHE_BYTES // (PAGE * KV_HEADS * (layers * token_bytes + others * 2 * HEAD_DIM * 4))


@pytest.fixture(scope="module")
def uncompressed(engines: Engines) -> Run:
    return engines([PROMPTS], **WHOLE)


@pytest.fixture(scope="module")
def plain(engines: Engines) -> Run:
    return engines([PROMPTS, SHORT], PACKED, **WHOLE)


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


def test_cached_prefixes_and_chunks_change_nothing(engines: Engines, plain: Run) -> None:
    run = engines([PROMPTS, PROMPTS], PACKED, max_num_batched_tokens=64)
    assert all(output["cached"] > 60 for output in run.passes[1][:2])
    assert run.tokens(0) == run.tokens(1) == plain.tokens()


def test_raw_prompts_stay_within_the_error_of_packing(engines: Engines, uncompressed: Run) -> None:
    whole = engines([PROMPTS], {}, **WHOLE)
    cut = engines([PROMPTS, PROMPTS], {}, max_num_batched_tokens=64)
    for run in (cut.passes[0], cut.passes[1], uncompressed.passes[0]):
        assert disagreement(whole.passes[0], run) < 0.5


def test_preempted_requests_resume_where_they_were(engines: Engines, plain: Run) -> None:
    few = {**WHOLE, "max_model_len": 512, "num_gpu_blocks_override": 17}
    run = engines([SHORT], PACKED, **few)
    assert run.preemptions
    assert run.tokens() == plain.tokens(1)


@pytest.mark.parametrize("drafts", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_speculation_changes_nothing(fresh_engines: Engines, plain: Run, drafts: int) -> None:
    speculative = {"method": "ngram", "num_speculative_tokens": drafts, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    run = fresh_engines.unless_vllm_fails([PROMPTS], PACKED, speculative_config=speculative, **WHOLE)
    assert run.accepted
    assert run.tokens() == plain.tokens()


def test_a_batch_of_mixed_lengths_is_its_requests_one_by_one(engines: Engines) -> None:
    prompts = [
        TEXT[start : start + length] for start, length in zip(range(0, 1200, 200), range(10, 850, 140), strict=True)
    ]
    run = engines([prompts, *([prompt] for prompt in prompts)], PACKED, max_num_batched_tokens=128, max_tokens=8)
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
        ({"kv_cache_dtype": "fp8"}, "packed pages replace --kv-cache-dtype fp8"),
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


def test_sizes_without_a_rotation_are_refused(engines: Engines, tmp_path: Path) -> None:
    assert "head_size not supported" in engines.refusal({}, model=model(tmp_path, "plain", head_dim=36), **RANDOM)


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
