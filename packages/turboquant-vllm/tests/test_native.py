"""Cache types that are taken over decide the bits, alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from turboquant_core.preset import Fingerprint, Preset, save_preset
from turboquant_vllm.errors import OptionError, UnsupportedError
from turboquant_vllm.native import native_options
from turboquant_vllm.options import UNCOMPRESSED, LayerBits, Options, read_options

TYPE = "turboquant_k3v4_nc"


def taken(turboquant: dict[str, Any] | None = None, cache_type: str = TYPE, **environment: str) -> Options:
    additional = {} if turboquant is None else {"turboquant": turboquant}
    return native_options(read_options(additional, environment), cache_type, additional, environment)


def test_the_type_decides_the_bits_and_leaves_the_rest() -> None:
    options = taken({"seed": 7, "layers": {"0": {"k_bits": 2}}}, TURBOQUANT_BITS="")
    assert (options.default, options.seed) == (LayerBits(3, 4), 7)
    assert options.layer(0, 4) == LayerBits(2, 2)


@pytest.mark.parametrize("given", [{"bits": 2}, {"k_bits": 3}, {"v_bits": "raw"}, {"compress_v": True}])
def test_other_bits_are_refused(given: dict[str, Any]) -> None:
    message = f"turboquant.{next(iter(given))} is given beside --kv-cache-dtype {TYPE}, which decides the bits"
    with pytest.raises(OptionError, match=message):
        taken(given)


def test_a_preset_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "preset.json"
    save_preset(Preset(Fingerprint("llama", 4, 2, 64, 256, 4096), (3, 2)), path)
    with pytest.raises(OptionError, match=r"turboquant.preset is given beside"):
        taken({"preset": str(path)})


@pytest.mark.parametrize("variable", [{"TURBOQUANT_BITS": "2"}, {"TURBOQUANT_COMPRESS_V": "0"}])
def test_variables_are_refused(variable: dict[str, str]) -> None:
    with pytest.raises(OptionError, match=f"{next(iter(variable))} is given beside"):
        taken(**variable)


@pytest.mark.parametrize("given", [{"boundary_layers": 1}, {"layers": {"2": UNCOMPRESSED}}])
def test_uncompressed_layers_are_named_to_vllm(given: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="pass --kv-cache-dtype-skip-layers"):
        taken(given)


def test_a_type_without_a_counterpart_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="turboquant_k8v4 has no counterpart in packed pages; taken over are"):
        taken(cache_type="turboquant_k8v4")
