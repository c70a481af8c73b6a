"""A file that `turboquant doctor` wrote decides bits, windows and centres of every layer of the model it looked at."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from turboquant_core import cli
from turboquant_core.preset import Preset, load_preset
from turboquant_vllm.centers import read_center
from turboquant_vllm.errors import OptionError
from turboquant_vllm.options import LayerBits, Options
from turboquant_vllm.setup import engine_options

TINY = Path(__file__).parents[3] / "examples" / "models" / "tiny"
TOKENS = "160"
"""Enough for a recent window of 64 to pay; the recommendation itself is the core's to test."""
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("doctor") / "preset.json"
    assert cli.main(["doctor", str(TINY), "--tokens", TOKENS, "--out", str(path)]) == cli.SAFE
    return path


@pytest.fixture(scope="module")
def preset(written: Path) -> Preset:
    return load_preset(written)


def engine(path: Path, **changes: Any) -> Options:
    """Options of an engine that serves the embedded model with ``changes`` of its configuration."""
    config = transformers.AutoConfig.from_pretrained(TINY)
    for name, value in changes.items():
        setattr(config, name, value)
    return engine_options(
        SimpleNamespace(
            additional_config={"turboquant": {"preset": str(path)}},
            speculative_config=None,
            model_config=SimpleNamespace(hf_config=config),
            cache_config=SimpleNamespace(cache_dtype="auto"),
        )
    )


def test_the_doctor_wrote_what_this_file_is_about(preset: Preset) -> None:
    """The keys of the embedded model have an offset, and recent tokens pay: centres and windows are both there."""
    assert sorted(preset.centers) == list(range(preset.model.layers))
    assert preset.windows.sink_tokens + preset.windows.recent_tokens > 0
    assert preset.windows.recent_tokens > 0


def test_every_layer_has_the_bits_that_the_doctor_chose(written: Path, preset: Preset) -> None:
    options = engine(written)
    layers = preset.model.layers
    assert [options.layer(i, layers) for i in range(layers)] == [
        LayerBits(*preset.layer_bits(i)) for i in range(layers)
    ]


def test_windows_are_those_of_the_file(written: Path, preset: Preset) -> None:
    options = engine(written)
    assert (options.sink_tokens, options.recent_tokens) == (preset.windows.sink_tokens, preset.windows.recent_tokens)


@pytest.mark.parametrize(("kv_heads", "first_head"), [(2, 0), (1, 0), (1, 1)])
def test_every_rank_reads_the_centres_of_its_heads(
    written: Path, preset: Preset, kv_heads: int, first_head: int
) -> None:
    model, options = preset.model, engine(written)
    assert options.key_centers == written
    for layer in range(model.layers):
        center = read_center(options.key_centers, layer, model.head_dim, kv_heads, first_head, model.kv_heads)
        assert center is not None
        assert torch.equal(center, preset.centers[layer][first_head : first_head + kv_heads])
        assert center.abs().max() > 0


@pytest.mark.parametrize("changes", [{"vocab_size": 7}, {"num_hidden_layers": 3}, {"hidden_size": 512}])
def test_another_model_is_refused(written: Path, changes: dict[str, int]) -> None:
    with pytest.raises(
        OptionError, match=f"the preset is for a model with .*, this one has {next(iter(changes.values()))}"
    ):
        engine(written, **changes)
