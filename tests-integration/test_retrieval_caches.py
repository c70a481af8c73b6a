"""The needle benchmark asks the cache that its command line names, a preset of the doctor among them."""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

ROOT = Path(__file__).parents[1]
TINY = ROOT / "examples" / "models" / "tiny"
sys.path.append(str(ROOT / "benchmarks"))

import retrieval  # noqa: E402
from report import digest  # noqa: E402
from retrieval_caches import caches, width, window  # noqa: E402

from turboquant_core import Windows  # noqa: E402
from turboquant_core.preset import Fingerprint, Preset, save_preset  # noqa: E402

TOKENS, HEAD_DIM, KV_HEADS, LAYERS = 200, 64, 2, 4


@pytest.fixture
def preset(tmp_path: Path) -> Path:
    model = Fingerprint.of(AutoConfig.from_pretrained(TINY))
    centers = {1: torch.full((model.kv_heads, model.head_dim), 0.25)}
    path = tmp_path / "mine.json"
    save_preset(Preset(model, (3, 2), {0: (4, 4)}, Windows(4, 8), centers), path)
    return path


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    rows = [
        {
            "length": TOKENS,
            "depth": depth,
            "distractors": 0,
            "prompt_ids": torch.randint(0, 1000, (TOKENS,), generator=generator).tolist(),
            "answer_ids": [5, 6],
        }
        for depth in range(2)
    ]
    path = tmp_path / "prompts.json.gz"
    path.write_bytes(gzip.compress(json.dumps(rows).encode()))
    return path


def test_widths_and_windows_of_the_command_line() -> None:
    assert width("3") == (3, 3)
    assert width("3.5,2") == (3.5, 2)
    assert window("4,64") == (4, 64)


@pytest.mark.parametrize("text", ["5", "four", "3,", "3,2,1", "1,4"])
def test_what_is_no_width(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=f"'{text}'"):
        width(text)


@pytest.mark.parametrize("text", ["4", "-1,4", "a,b"])
def test_what_are_no_windows(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=f"'{text}'"):
        window(text)


def test_a_preset_is_measured_in_place_of_the_default_widths(preset: Path) -> None:
    assert retrieval.parse(["model", "prompts"]).bits == retrieval.BITS
    assert retrieval.parse(["model", "prompts", "--preset", str(preset)]).bits == []
    both = retrieval.parse(["model", "prompts", "--preset", str(preset), "--bits", "4", "3,2"])
    assert both.bits == [(4, 4), (3, 2)]


def test_caches_are_those_that_their_names_say(preset: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.bfloat16, local_files_only=True).eval()
    makers = caches([(4, 4), (3, 2)], [(4, 16), (0, 64)], ["packed alone", "windows"], [preset], seed=7)
    assert list(makers) == [
        "full precision",
        "4 bit, packed alone",
        "4 bit, centred keys, windows 4 + 16",
        "4 bit, centred keys, windows 0 + 64",
        "keys 3, values 2 bit, packed alone",
        "keys 3, values 2 bit, centred keys, windows 4 + 16",
        "keys 3, values 2 bit, centred keys, windows 0 + 64",
        "preset mine: keys 3, values 2 bit, bits by layer, centred keys, windows 4 + 8",
    ]
    widest, recommended = (make(model).options for make in list(makers.values())[-2:])
    assert (widest.layer_bits(0), widest.windows, widest.center_keys) == ((3, 2), Windows(0, 64), True)
    assert widest.seed == recommended.seed == 7
    assert [recommended.layer_bits(i) for i in range(LAYERS)] == [(4, 4), (3, 2), (3, 2), (3, 2)]
    assert recommended.windows == Windows(4, 8)
    assert torch.equal(recommended.center_keys[1], torch.full((KV_HEADS, HEAD_DIM), 0.25))


def test_a_run_records_what_it_asked(
    preset: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "found.json"
    words = [str(TINY), str(prompts), "--preset", str(preset), "--seed", "7", "--chunk", "64", "--json", str(target)]
    monkeypatch.setattr(sys, "argv", ["retrieval.py", *words])
    retrieval.main()
    results = json.loads(target.read_text())["results"]
    assert results["model_sha256"] == digest(TINY / "model.safetensors")
    assert results["prompts_sha256"] == digest(prompts)
    assert results["presets_sha256"] == {"mine.json": digest(preset)}
    assert (results["seed"], results["dtype"]) == (7, "bfloat16")
    full, packed = (found[str(TOKENS)] for found in results["caches"].values())
    assert full["bits"] == 16
    assert list(full["right_by_depth"]) == ["0", "1"]
    assert packed["bits"] == pytest.approx(expected_bits(TOKENS + 1))
    table = capsys.readouterr().out
    assert "| cache | bits | tokens |" in table
    assert f"| {packed['bits']:.4g} | {TOKENS} |" in table


def expected_bits(tokens: int) -> float:
    """Of the preset above: codes and scales of all but 8 recent tokens, 4 sinks exact too, a float32 centre."""
    recent, sinks, scale = 8, 4, 16
    codes = 4 * 2 + (LAYERS - 1) * (3 + 2)
    packed = (tokens - recent) * KV_HEADS * (HEAD_DIM * codes + LAYERS * 2 * scale)
    exact = (recent + sinks) * KV_HEADS * LAYERS * 2 * HEAD_DIM * 16
    return (packed + exact + KV_HEADS * HEAD_DIM * 32) / (tokens * KV_HEADS * LAYERS * 2 * HEAD_DIM)


def test_a_preset_that_is_not_there(prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [str(TINY), str(prompts), "--preset", str(tmp_path / "none.json"), "--json", str(tmp_path / "x.json")]
    monkeypatch.setattr(sys, "argv", ["retrieval.py", *words])
    with pytest.raises(SystemExit, match=r"none\.json is no preset"):
        retrieval.main()
    assert not (tmp_path / "x.json").exists()


def test_lengths_that_no_prompt_has(prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [str(TINY), str(prompts), "--lengths", "4096", "--json", str(tmp_path / "x.json")]
    monkeypatch.setattr(sys, "argv", ["retrieval.py", *words])
    with pytest.raises(SystemExit, match=r"no prompts of --lengths \[4096\]"):
        retrieval.main()


def test_files_without_true_bits_are_shown_without_them() -> None:
    found: dict[str, Any] = {"prompts": 2, "right": 1, "interval": [0.1, 0.9], "lost": 1, "won": 0}
    older, newer = {"a": {"64": found}}, {"a": {"64": {**found, "bits": 3.5}}}
    assert retrieval.columns(older) == retrieval.COLUMNS
    assert retrieval.shares(older) == [["a", "64", "1 / 2", "0.100 to 0.900", 1, 0]]
    assert retrieval.columns(newer)[:3] == ("cache", "bits", "tokens")
    assert retrieval.shares(newer) == [["a", 3.5, "64", "1 / 2", "0.100 to 0.900", 1, 0]]
