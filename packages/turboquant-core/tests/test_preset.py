"""Presets: written and read back, refused when damaged or for another model."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from turboquant_core import LayoutError, Windows
from turboquant_core.layout import BITS
from turboquant_core.preset import Fingerprint, Preset, PresetError, load_preset, save_preset

MODEL = Fingerprint("llama", 4, 2, 16, 64, 100)
CONFIG = SimpleNamespace(
    model_type="llama",
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    hidden_size=64,
    vocab_size=100,
)
PAIRS = st.tuples(st.sampled_from(BITS), st.sampled_from(BITS))


@settings(deadline=None)
@given(
    bits=PAIRS,
    layers=st.dictionaries(st.integers(0, 3), PAIRS),
    centred=st.sets(st.integers(0, 3)),
    sinks=st.integers(0, 8),
    recent=st.integers(0, 128),
)
def test_what_is_saved_is_loaded(
    tmp_path_factory: pytest.TempPathFactory, bits: Any, layers: Any, centred: set[int], sinks: int, recent: int
) -> None:
    path = tmp_path_factory.mktemp("preset") / "preset.json"
    centers = {index: torch.randn(2, 16) for index in centred}
    preset = Preset(MODEL, bits, layers, Windows(sinks, recent), centers, {"divergence": 0.01})
    save_preset(preset, path)
    got = load_preset(path)
    assert (got.model, got.bits, got.windows) == (MODEL, bits, Windows(sinks, recent))
    assert dict(got.layers) == layers
    assert dict(got.measured) == {"divergence": 0.01}
    assert got.centers.keys() == centers.keys()
    assert all(torch.equal(got.centers[index], center) for index, center in centers.items())
    assert [type(b) for b in got.bits] == [type(b) for b in bits]
    for index in range(4):
        assert got.layer_bits(index) == layers.get(index, bits)


def test_fingerprint_of_a_configuration() -> None:
    assert Fingerprint.of(CONFIG) == MODEL
    plain = SimpleNamespace(**vars(CONFIG) | {"head_dim": None, "num_key_value_heads": None})
    assert Fingerprint.of(plain) == Fingerprint("llama", 4, 4, 16, 64, 100)
    nested = SimpleNamespace(get_text_config=lambda decoder: CONFIG)
    assert Fingerprint.of(nested) == MODEL
    with pytest.raises(PresetError, match="names no num_attention_heads"):
        Fingerprint.of(SimpleNamespace(model_type="odd"))


def test_another_model_is_refused() -> None:
    preset = Preset(MODEL, (4, 4))
    preset.check(CONFIG)
    other = SimpleNamespace(**vars(CONFIG) | {"num_hidden_layers": 8})
    with pytest.raises(PresetError, match="for a model with layers 4, this one has 8: run turboquant doctor"):
        preset.check(other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": (5, 4)}, "bits is 5"),
        ({"bits": (4,)}, "must be a pair"),
        ({"layers": {4: (4, 4)}}, "layers names layer 4; the model has layers 0 to 3"),
        ({"layers": {0: (4, 1)}}, "bits is 1"),
        ({"centers": {-1: torch.zeros(2, 16)}}, "centers names layer -1"),
        ({"centers": {0: torch.zeros(2, 8)}}, r"centre of layer 0 is \(2, 8\)"),
        ({"centers": {0: torch.full((2, 16), torch.nan)}}, "must be finite"),
    ],
)
def test_fields_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((PresetError, LayoutError), match=message):
        Preset(**{"model": MODEL, "bits": (4, 4), **changes})


def damaged(tmp_path: Path, **changes: Any) -> Path:
    path = tmp_path / "preset.json"
    save_preset(Preset(MODEL, (4, 3), centers={1: torch.ones(2, 16)}), path)
    body = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in body.items() if value is not None}))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "does not say format 'turboquant-preset'"),
        ({"version": 2}, "preset version 2; this release reads 1"),
        ({"bits": [4]}, "damaged preset"),
        ({"bits": [4, 9]}, "bits is 9"),
        ({"bits": None}, "it has no 'bits'"),
        ({"model": {"layers": 1}}, "damaged preset"),
        ({"windows": {"sink_tokens": -1}}, "sink_tokens is -1"),
        ({"centers": {"1": "AAAA"}}, "a centre has 3 bytes"),
        ({"centers": {"1": "?"}}, "no base64"),
        ({"centers": {"x": "AAAA"}}, "damaged preset"),
    ],
)
def test_damaged_files(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PresetError, match=message):
        load_preset(damaged(tmp_path, **changes))


def test_files_that_are_no_presets(tmp_path: Path) -> None:
    with pytest.raises(PresetError, match=r"missing\.json is no preset"):
        load_preset(tmp_path / "missing.json")
    for content in (b"{", b"[]", b"\xff\xfe"):
        (tmp_path / "odd.json").write_bytes(content)
        with pytest.raises(PresetError, match=r"odd\.json is no preset"):
            load_preset(tmp_path / "odd.json")
