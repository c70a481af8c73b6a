"""Presets as bits: measured, from a file, from the object; refused where they do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from turboquant_core import TurboQuantError, Windows
from turboquant_core.doctor import calibration_ids, examine
from turboquant_core.doctor.diagnosis import MAX_DIVERGENCE, Diagnosis
from turboquant_core.doctor.simulation import Treatment, divergence, run
from turboquant_core.preset import Fingerprint, Preset, PresetError, save_preset
from turboquant_hf import TurboQuantCache, patch_model, presets, turboquant, unpatch_model
from turboquant_hf.compat import CACHE_ARGUMENT
from turboquant_hf.layer import TurboQuantLayer
from turboquant_hf.presets import measured_preset, preset_options

from .conftest import TINY


def preset_for(model: Any, **changes: Any) -> Preset:
    """4 and 3 bits, the last layer spared, the first centred, two sinks and eight recent tokens."""
    fingerprint = Fingerprint.of(model.config)
    shape = fingerprint.kv_heads, fingerprint.head_dim
    fields: dict[str, Any] = {
        "bits": (3.5, 3),
        "layers": {fingerprint.layers - 1: (4, 4)},
        "windows": Windows(2, 8),
        "centers": {0: torch.full(shape, 0.25)},
    }
    return Preset(fingerprint, **fields | changes)


def assert_follows(cache: TurboQuantCache, preset: Preset) -> None:
    assert cache.options.windows == preset.windows
    for index in range(preset.model.layers):
        assert cache.options.layer_bits(index) == preset.layer_bits(index)
        center = cache.options.center(index, torch.zeros(1, 1, 1, 1))
        expected = preset.centers.get(index)
        assert (center is None) == (expected is None)
        assert center is None or torch.equal(center, expected)


@pytest.mark.parametrize("as_file", [False, True])
def test_a_preset_is_followed(llama: Any, tmp_path: Path, as_file: bool) -> None:
    preset = preset_for(llama)
    path = tmp_path / "preset.json"
    save_preset(preset, path)
    cache = patch_model(llama, path if as_file else preset)
    assert_follows(cache, preset)
    ids = torch.randint(3, 90, (1, 40), generator=torch.Generator().manual_seed(1))
    llama.generate(ids, max_new_tokens=3, do_sample=False, **{CACHE_ARGUMENT: cache})
    assert isinstance(cache.layers[0], TurboQuantLayer)
    assert torch.equal(cache.key_centers()[0], preset.centers[0])
    assert list(cache.key_centers()) == [0]


def test_the_context_manager_takes_a_preset_once(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    preset, asked = preset_for(llama), []
    monkeypatch.setattr(presets, "measured_preset", lambda *arguments: asked.append(arguments) or preset)
    ids = torch.randint(3, 90, (1, 40), generator=torch.Generator().manual_seed(1))
    with turboquant(llama, "auto", calibration=ids):
        got = [llama.generate(ids, max_new_tokens=2, do_sample=False, return_dict_in_generate=True) for _ in range(2)]
    assert len(asked) == 1
    assert asked[0] == (llama, ids)
    for output in got:
        cache = output.cache if hasattr(output, "cache") else output.past_key_values
        assert_follows(cache, preset)


def test_auto_measures_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache follows what the doctor found on its text, and that is what this model's keys and logits say."""
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    seen: list[tuple[torch.Tensor, Diagnosis]] = []

    def watched(examined: Any, ids: torch.Tensor) -> Diagnosis:
        assert examined is model
        seen.append((ids, examine(examined, ids)))
        return seen[-1][1]

    monkeypatch.setattr(presets, "examine", watched)
    cache = patch_model(model, "auto")
    ((ids, diagnosis),) = seen
    preset = diagnosis.preset
    assert preset is not None
    assert_follows(cache, preset)
    assert cache.verification is not None
    unpatch_model(model)
    assert torch.equal(ids, calibration_ids(AutoTokenizer.from_pretrained(TINY)))
    assert_measured(model, ids, preset)


def assert_measured(model: Any, ids: torch.Tensor, preset: Preset) -> None:
    """Centres are the mean keys of ``ids``, and the preset diverges by what it says, within the doctor's limit."""
    exact, past = run(model, ids, None)
    assert sorted(preset.centers) == list(range(preset.model.layers))
    for index, center in preset.centers.items():
        torch.testing.assert_close(center, past.layers[index].keys[0].mean(1), rtol=1e-4, atol=1e-4)
    bits = {index: preset.layer_bits(index) for index in range(preset.model.layers)}
    got, _ = run(model, ids, Treatment(bits, centers=preset.centers, windows=preset.windows))
    assert divergence(exact, got) == pytest.approx(preset.measured["divergence"], rel=1e-3)
    assert preset.measured["divergence"] <= MAX_DIVERGENCE
    assert preset.measured["tokens"] == ids.shape[1]


def test_auto_passes_on_a_refusal(monkeypatch: pytest.MonkeyPatch, llama: Any) -> None:
    class Refusal:
        preset = None
        refusal = "at 4 bits it diverges"

    monkeypatch.setattr(presets, "examine", lambda model, ids: Refusal())
    with pytest.raises(TurboQuantError, match="finds no safe bits for LlamaForCausalLM; at 4 bits it diverges"):
        measured_preset(llama, torch.ones(1, 200, dtype=torch.int64))
    assert llama.config._attn_implementation == "sdpa"


def test_auto_without_a_tokenizer(llama: Any) -> None:
    with pytest.raises(TurboQuantError, match="pass calibration"):
        patch_model(llama, "auto")


def test_a_preset_of_another_model(llama: Any) -> None:
    preset = Preset(Fingerprint("llama", 2, 2, 64, 128, 97), (4, 4))
    with pytest.raises(PresetError, match="the preset is for a model with head_dim 64, this one has 32"):
        patch_model(llama, preset)
    with pytest.raises(PresetError, match="head_dim"):
        preset_options(preset, llama.config)


def test_options_beside_a_preset(llama: Any) -> None:
    with pytest.raises(ValueError, match="center_keys is given beside a preset"):
        patch_model(llama, preset_for(llama), center_keys=True)
    with pytest.raises(ValueError, match=r"bits is 'nowhere\.json', which is no file"):
        patch_model(llama, "nowhere.json")


def test_the_doctor_simulates_what_the_cache_does() -> None:
    """Log-probabilities of a chunk read from the pages are those of the doctor's stock cache, to rounding."""
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    preset = preset_for(model, windows=Windows(sink_tokens=1))
    ids = torch.randint(3, 4000, (1, 60), generator=torch.Generator().manual_seed(1))
    cache = patch_model(model, preset, verify=False)
    with torch.no_grad():
        # A cache attends to its first chunk as it came: to one token, exact here as a sink.
        model(input_ids=ids[:, :1], use_cache=True, **{CACHE_ARGUMENT: cache})
        packed = model(input_ids=ids[:, 1:], use_cache=True, **{CACHE_ARGUMENT: cache}).logits[0].log_softmax(-1)
    unpatch_model(model)
    bits = {index: preset.layer_bits(index) for index in range(preset.model.layers)}
    simulated, _ = run(model, ids, Treatment(bits, preset.centers, preset.windows))
    exact, _ = run(model, ids, None)
    assert divergence(exact[1:], packed) > 1e-2
    assert divergence(simulated[1:], packed) < 1e-4 * divergence(exact[1:], packed)
