"""What an engine may be given: centred keys, presets, a second engine, more ranks, a draft model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from turboquant_core.preset import Fingerprint, Preset, save_preset

from .conftest import TEXT, Engines, Run, disagreement, drift
from .models import IDS, RANDOM, model

PROMPTS = [TEXT[:600], TEXT[1000:1400], "The Congress shall have"]
LAYERS, KV_HEADS, HEAD_DIM = 4, 2, 64
PACKED = {"prefill": "packed"}
WHOLE: dict[str, Any] = {"max_num_batched_tokens": 2048, "enable_prefix_caching": False}
FINGERPRINT = Fingerprint("llama", LAYERS, KV_HEADS, HEAD_DIM, 256, 4096)
PROCESSES = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
RANKS = {**PROCESSES, "VLLM_CPU_NUM_OF_RESERVED_CPU": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


@pytest.fixture(scope="module")
def uncompressed(engines: Engines) -> Run:
    return engines([PROMPTS], **WHOLE)


@pytest.fixture(scope="module")
def plain(engines: Engines) -> Run:
    return engines([PROMPTS], PACKED, **WHOLE)


def centers(folder: Path, heads: int = KV_HEADS) -> str:
    path = folder / "centers.safetensors"
    generator = torch.Generator().manual_seed(0)
    save_file({"key_centers": torch.randn(LAYERS, heads, HEAD_DIM, generator=generator)}, path)
    return str(path)


def test_centred_keys(engines: Engines, uncompressed: Run, plain: Run, tmp_path: Path) -> None:
    run = engines([PROMPTS], {**PACKED, "key_centers": centers(tmp_path)}, **WHOLE)
    assert "keys 4 bits, values 4 bits, centred keys" in engines.log.read_text()
    # Another rounding of the keys, and no constant left in the scores.
    assert drift(plain.passes[0], run.passes[0]) > 1e-3
    assert drift(uncompressed.passes[0], run.passes[0]) < 0.3
    cut = engines([PROMPTS, PROMPTS], {**PACKED, "key_centers": centers(tmp_path)}, max_num_batched_tokens=64)
    assert cut.tokens(1) == run.tokens()


def test_centres_that_do_not_fit_are_refused(engines: Engines, tmp_path: Path) -> None:
    assert "holds (4, 3, 64); layer 0 of this model needs" in engines.refusal({"key_centers": centers(tmp_path, 3)})


@pytest.mark.usefixtures("sized_pages")
def test_centres_and_sinks_are_refused(engines: Engines, tmp_path: Path) -> None:
    path = tmp_path / "centers.safetensors"
    save_file({"key_centers": torch.zeros(LAYERS, 2, 32)}, path)
    refusal = engines.refusal({"key_centers": str(path)}, model=model(tmp_path, "sinks and windows"), **RANDOM)
    assert "turboquant.key_centers does not work for a model with attention sinks" in refusal


def test_a_preset_decides(engines: Engines, tmp_path: Path) -> None:
    path = tmp_path / "preset.json"
    save_preset(Preset(FINGERPRINT, (3, 2), layers={0: (4, 4)}), path)
    run = engines([PROMPTS], {**PACKED, "preset": str(path)}, max_tokens=1, **WHOLE)
    by_hand = {**PACKED, "k_bits": 3, "v_bits": 2, "layers": {"0": {"k_bits": 4}}}
    expected = engines([PROMPTS], by_hand, max_tokens=1, **WHOLE)
    assert run.blocks == expected.blocks
    assert run.passes == expected.passes


def test_a_preset_of_another_model_is_refused(engines: Engines, tmp_path: Path) -> None:
    path = tmp_path / "preset.json"
    save_preset(Preset(FINGERPRINT, (3, 2)), path)
    refusal = engines.refusal({"preset": str(path)}, model=model(tmp_path, "plain"), **RANDOM)
    assert "turboquant.preset: the preset is for a model with head_dim 64, this one has 32" in refusal


@pytest.mark.slow
def test_two_engines_at_once(engines: Engines, plain: Run) -> None:
    run = engines([PROMPTS], PACKED, beside={**PACKED, "bits": 2}, environment=PROCESSES, **WHOLE)
    alone = engines([PROMPTS], {**PACKED, "bits": 2}, **WHOLE)
    assert run.tokens() == plain.tokens()
    assert [output["tokens"] for output in run.beside[0]] == alone.tokens()
    assert alone.tokens() != plain.tokens()


@pytest.mark.slow
def test_two_ranks(engines: Engines, plain: Run, tmp_path: Path) -> None:
    ranks: dict[str, Any] = {"tensor_parallel_size": 2, "environment": RANKS}
    run = engines([PROMPTS], PACKED, **ranks, **WHOLE)
    assert run.blocks == pytest.approx(2 * plain.blocks, abs=1)
    assert disagreement(plain.passes[0], run.passes[0]) < 1e-3
    centred = {**PACKED, "key_centers": centers(tmp_path)}
    one, two = engines([PROMPTS], centred, **WHOLE), engines([PROMPTS], centred, **ranks, **WHOLE)
    assert disagreement(one.passes[0], two.passes[0]) < 1e-3


@pytest.mark.slow
def test_a_draft_model(fresh_engines: Engines, tmp_path: Path) -> None:
    target = model(tmp_path, "plain")
    (tmp_path / "draft").mkdir()
    draft = model(tmp_path / "draft", "plain", num_hidden_layers=2)
    options = {**PACKED, "layers": {"3": {"k_bits": 3}}}
    plain = fresh_engines([IDS], options, model=target, **RANDOM)
    speculative = {"method": "draft_model", "model": draft, "num_speculative_tokens": 2}
    run = fresh_engines([IDS], options, model=target, speculative_config=speculative, **RANDOM)
    assert run.accepted is not None
    assert run.tokens() == plain.tokens()
