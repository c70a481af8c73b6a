"""A preset of turboquant-core as an option: bits, spared layers and centres; refused where it does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from turboquant_core import Windows
from turboquant_core.preset import Fingerprint, Preset, save_preset
from turboquant_vllm.centers import read_center
from turboquant_vllm.errors import OptionError
from turboquant_vllm.options import LayerBits, Options, read_options

MODEL = Fingerprint("llama", 4, 2, 16, 64, 100)


def saved(tmp_path: Path, **fields: Any) -> Path:
    path = tmp_path / "preset.json"
    save_preset(Preset(**{"model": MODEL, "bits": (3, 2.5), **fields}), path)
    return path


def read(path: Path, **others: Any) -> Options:
    return read_options({"turboquant": {"preset": str(path), **others}}, {"TURBOQUANT_BITS": "2"})


def test_bits_layers_and_centres(tmp_path: Path) -> None:
    center = torch.arange(32.0).view(2, 16)
    path = saved(tmp_path, layers={3: (4, 4)}, centers={1: center})
    options = read(path, seed=7, provider="reference")
    assert options.default == options.layer(0, 4) == LayerBits(3, 2.5)
    assert options.layer(3, 4) == LayerBits(4, 4)
    assert options.key_centers == path
    assert (options.seed, options.provider) == (7, "reference")
    assert read_center(path, 0, 16, 2, 0, 2) is None
    second = read_center(path, 1, 16, 1, 1, 2)
    assert second is not None
    assert torch.equal(second, center[1:])


def test_without_centres(tmp_path: Path) -> None:
    assert read(saved(tmp_path)).key_centers is None


@pytest.mark.parametrize("name", ["bits", "k_bits", "layers", "key_centers", "sink_tokens", "recent_tokens"])
def test_what_the_preset_decides_may_not_be_given(tmp_path: Path, name: str) -> None:
    path = saved(tmp_path)
    value = {"layers": {"0": "uncompressed"}, "key_centers": str(path)}.get(name, 4)
    with pytest.raises(OptionError, match=rf"turboquant\.{name} is given beside turboquant\.preset"):
        read(path, **{name: value})


def test_windows(tmp_path: Path) -> None:
    options = read(saved(tmp_path, windows=Windows(4, 64)))
    assert (options.sink_tokens, options.recent_tokens) == (4, 64)
    with pytest.raises(OptionError, match="packs nothing before 9 tokens, which pages of vLLM cannot do"):
        read(saved(tmp_path, windows=Windows(4, 64, 9)))


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="no file on this machine"):
        read(tmp_path / "none.json")
    broken = tmp_path / "broken.json"
    broken.write_text("{}")
    with pytest.raises(OptionError, match="is no preset"):
        read(broken)
    with pytest.raises(OptionError, match="is no preset"):
        read_center(broken, 0, 16, 2, 0, 2)
    path = saved(tmp_path, centers={1: torch.ones(2, 16)})
    with pytest.raises(OptionError, match="run turboquant doctor on it"):
        read_center(path, 1, 32, 2, 0, 2)
    with pytest.raises(OptionError, match="this model has layer 4"):
        read_center(path, 4, 16, 2, 0, 2)
