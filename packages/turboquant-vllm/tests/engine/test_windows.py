"""First and recent tokens in full precision inside pages: closer text, and the same whatever the scheduler does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from turboquant_vllm.compat import backend_sizes_pages

from .conftest import CACHE_BYTES, TEXT, TINY, Engines, Run, disagreement, drift
from .test_engine import HEAD_DIM, KV_HEADS, LAYERS, PROMPTS, SHORT, WHOLE

PAGE = 64
WINDOWS = {"sink_tokens": 4, "recent_tokens": 24}
PACKED = {"prefill": "packed", **WINDOWS}
LARGE: dict[str, Any] = {**WHOLE, "block_size": PAGE}
ROW = 2 * HEAD_DIM * 4
"""Bytes of a key and a value in float32."""


@pytest.fixture(scope="module")
def uncompressed(engines: Engines) -> Run:
    return engines([PROMPTS], **LARGE)


@pytest.fixture(scope="module")
def plain(engines: Engines) -> Run:
    return engines([PROMPTS], PACKED, **LARGE)


def test_blocks_hold_the_rows(plain: Run) -> None:
    block = KV_HEADS * (PAGE * 68 + 28 * ROW)
    assert plain.blocks == CACHE_BYTES // (LAYERS * block)


def test_text_is_closer_than_without(engines: Engines, plain: Run, uncompressed: Run) -> None:
    without = engines([PROMPTS], {"prefill": "packed"}, max_tokens=1, **LARGE)
    assert drift(uncompressed.passes[0], plain.passes[0]) < 0.3 * drift(uncompressed.passes[0], without.passes[0])
    assert disagreement(uncompressed.passes[0], plain.passes[0]) < 0.2


def test_windows_as_long_as_the_text_are_exact(engines: Engines, uncompressed: Run) -> None:
    """Everything is in a window: what is read must be what was written, at every position and in every block."""
    short = [TEXT[:60], TEXT[500:530], "We"]
    exact = {"bits": 2, "recent_tokens": 60}
    large = {**LARGE, "block_size": 256}
    full = engines([short], **large)
    for prefill in ("packed", "raw"):
        run = engines([short], {"prefill": prefill, **exact}, **large)
        assert run.tokens() == full.tokens()
        assert drift(full.passes[0], run.passes[0]) < 1e-4


def test_cached_prefixes_and_chunks_change_nothing(engines: Engines, plain: Run) -> None:
    run = engines([PROMPTS, PROMPTS], PACKED, max_num_batched_tokens=70, block_size=PAGE)
    assert all(output["cached"] >= PAGE for output in run.passes[1][:2])
    assert run.tokens(0) == run.tokens(1) == plain.tokens()


def test_a_prefix_that_is_computed_in_the_same_step(engines: Engines) -> None:
    prompts = [PROMPTS[0], PROMPTS[0] + " and", PROMPTS[0][:-30] + " or"]
    alone = engines([[prompt] for prompt in prompts], PACKED, **LARGE)
    together = engines([prompts], PACKED, max_num_batched_tokens=2048, block_size=PAGE)
    assert any(output["cached"] for output in together.passes[0])
    assert together.tokens() == [alone.tokens(index)[0] for index in range(len(prompts))]


def test_raw_prompts_stay_within_the_error_of_packing(engines: Engines, uncompressed: Run) -> None:
    whole = engines([PROMPTS], WINDOWS, **LARGE)
    cut = engines([PROMPTS, PROMPTS], WINDOWS, max_num_batched_tokens=70, block_size=PAGE)
    for run in (cut.passes[0], cut.passes[1], uncompressed.passes[0]):
        assert disagreement(whole.passes[0], run) < 0.2


def test_preempted_requests_resume_where_they_were(engines: Engines) -> None:
    """Eight requests of one block each fill the cache, and each grows into a second."""
    few = {**LARGE, "max_model_len": 512, "num_gpu_blocks_override": 9}
    plain = engines([SHORT[:8]], PACKED, max_tokens=60, **LARGE)
    run = engines([SHORT[:8]], PACKED, max_tokens=60, **few)
    assert run.preemptions
    assert run.tokens() == plain.tokens()


@pytest.mark.parametrize("drafts", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_speculation_changes_nothing(fresh_engines: Engines, plain: Run, drafts: int) -> None:
    speculative = {"method": "ngram", "num_speculative_tokens": drafts, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    run = fresh_engines.unless_vllm_fails([PROMPTS], PACKED, speculative_config=speculative, **LARGE)
    assert run.accepted
    assert run.tokens() == plain.tokens()


def test_a_batch_of_mixed_lengths_is_its_requests_one_by_one(engines: Engines) -> None:
    prompts = [
        TEXT[start : start + length] for start, length in zip(range(0, 1200, 200), range(10, 850, 140), strict=True)
    ]
    cut = {"max_num_batched_tokens": 128, "block_size": PAGE, "max_tokens": 40}
    run = engines([prompts, *([prompt] for prompt in prompts)], {**PACKED, "bits": 3}, **cut)
    assert run.tokens(0) == [run.tokens(1 + index)[0] for index in range(len(prompts))]


@pytest.mark.slow
@pytest.mark.parametrize("windows", [{"sink_tokens": 4}, {"recent_tokens": 24}])
def test_each_window_alone(engines: Engines, windows: dict[str, int], uncompressed: Run) -> None:
    whole = engines([PROMPTS], {"prefill": "packed", **windows}, **LARGE)
    cut = engines([PROMPTS], {"prefill": "packed", **windows}, max_num_batched_tokens=70, block_size=PAGE)
    assert cut.tokens() == whole.tokens()
    assert drift(uncompressed.passes[0], whole.passes[0]) < 0.3


def test_the_start_line(engines: Engines, plain: Run) -> None:
    log = engines.log.read_text()
    assert (
        "4 of 4 layers: keys 4 bits, values 4 bits, 292 bytes a token and head instead of 512, 224 of them for the "
        "first 4 and the last 24 tokens in the model's dtype in blocks of 64" in log
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recent_tokens": 65}, "need 0 + 65 rows a block, and blocks have 64 tokens: set --block-size 512"),
        ({"recent_tokens": 64}, "that makes 580 bytes a token and head, no fewer than the 512 without packing"),
        ({"sink_tokens": -1}, "turboquant.sink_tokens is -1; it must be a number of tokens"),
    ],
)
def test_what_makes_no_sense_is_refused(engines: Engines, options: dict[str, Any], message: str) -> None:
    assert message in engines.refusal(options, **LARGE)


def test_sliding_windows_are_refused(engines: Engines, tmp_path: Path) -> None:
    config = {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "head_dim": 32,
        "vocab_size": 512,
        "max_position_embeddings": 512,
        "sliding_window": 32,
        "torch_dtype": "float32",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    message = engines.refusal(
        WINDOWS, model=str(tmp_path), load_format="dummy", skip_tokenizer_init=True, **{**LARGE, "max_model_len": 512}
    )
    reasons = ("do not work for a layer with a sliding window of 32", "sliding window not supported")
    assert reasons[not backend_sizes_pages()] in message


def test_text_is_that_of_the_transformers_integration(engines: Engines) -> None:
    """Two implementations of the same windows; at 2 bits another window gives another text."""
    options = {"bits": 2, **WINDOWS}
    served = engines([PROMPTS], options, max_tokens=40, **LARGE)
    wider = engines([PROMPTS], {**options, "recent_tokens": 8}, max_tokens=40, **LARGE)
    expected = transformers_tokens(PROMPTS, 40, bits=2, center_keys=False, **WINDOWS)
    assert served.tokens() == expected
    assert wider.tokens() != expected


def transformers_tokens(prompts: list[str], max_tokens: int, **options: Any) -> list[list[int]]:
    turboquant_hf = pytest.importorskip("turboquant_hf")
    cache_argument = pytest.importorskip("turboquant_hf.compat").CACHE_ARGUMENT
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    found = []
    for prompt in prompts:
        model = transformers.AutoModelForCausalLM.from_pretrained(TINY).float().eval()
        cache = turboquant_hf.patch_model(model, verify=False, **options)
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        given = {cache_argument: cache, "max_new_tokens": max_tokens}
        text = model.generate(ids, **given, do_sample=False, eos_token_id=None, pad_token_id=0)
        found.append(text[0, ids.shape[1] :].tolist())
    return found
