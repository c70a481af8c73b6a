"""Every option is read, and every mistake is refused with a message that names what is allowed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from turboquant_vllm.errors import OptionError
from turboquant_vllm.options import UNCOMPRESSED, LayerBits, Options, read_options


def read(turboquant: Any = None, **environment: str) -> Options:
    return read_options({} if turboquant is None else {"turboquant": turboquant}, environment)


def test_defaults() -> None:
    assert read() == Options()
    assert read().default == LayerBits(4, 4)
    assert read_options(None, {}) == Options()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"bits": 3}, LayerBits(3, 3)),
        ({"bits": 2.5}, LayerBits(2.5, 2.5)),
        ({"k_bits": 4, "v_bits": 2}, LayerBits(4, 2)),
        ({"bits": 3, "k_bits": 4}, LayerBits(4, 3)),
        ({"v_bits": "raw"}, LayerBits(4, "raw")),
        ({"compress_v": False}, LayerBits(4, "raw")),
        ({"bits": 3, "compress_v": False}, LayerBits(3, "raw")),
        ({"bits": 2, "compress_v": True}, LayerBits(2, 2)),
    ],
)
def test_bits(given: dict[str, Any], expected: LayerBits) -> None:
    assert read(given).default == expected


def test_environment() -> None:
    assert read(TURBOQUANT_BITS="3").default == LayerBits(3, 3)
    assert read(TURBOQUANT_BITS="2", TURBOQUANT_COMPRESS_V="0").default == LayerBits(2, "raw")
    assert read(TURBOQUANT_BITS="", TURBOQUANT_COMPRESS_V="").default == LayerBits(4, 4)


def test_the_configuration_wins_over_the_environment() -> None:
    assert read({"bits": 4}, TURBOQUANT_BITS="2").default == LayerBits(4, 4)
    assert read({"k_bits": 4}, TURBOQUANT_BITS="2").default == LayerBits(4, 2)
    assert read({"compress_v": True}, TURBOQUANT_BITS="3", TURBOQUANT_COMPRESS_V="0").default == LayerBits(3, 3)


def test_layers() -> None:
    options = read(
        {"layers": {"1": {"k_bits": 3}, "-1": UNCOMPRESSED}, "boundary_layers": 1, "boundary": {"v_bits": "raw"}}
    )
    chosen = [options.layer(index, 5) for index in range(5)]
    assert chosen == [LayerBits(4, "raw"), LayerBits(3, 3), LayerBits(), LayerBits(), UNCOMPRESSED]


def test_boundary_layers_are_uncompressed_unless_said_otherwise() -> None:
    options = read({"boundary_layers": 2})
    assert [options.layer(index, 6) == UNCOMPRESSED for index in range(6)] == [True, True, False, False, True, True]


def test_layers_of_a_draft_model_get_the_default() -> None:
    options = read({"layers": {"-1": UNCOMPRESSED}, "boundary_layers": 1})
    assert options.layer(4, 4) == options.layer(None, 4) == LayerBits()


def test_a_layer_beyond_the_model_is_refused() -> None:
    with pytest.raises(OptionError, match=r"names layer 7; the model has layers -4 to 3"):
        read({"layers": {"7": UNCOMPRESSED}}).check_layers(4)


def test_a_layer_that_is_named_twice_is_refused() -> None:
    with pytest.raises(OptionError, match=r"names layer 1 of 4 as 1 and as -3: drop one of them"):
        read({"layers": {"1": {"k_bits": 2}, "-3": {"k_bits": 3}}}).check_layers(4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bit": 4}, "unknown turboquant option 'bit'; the options are bits, boundary"),
        ({"bits": 5}, "turboquant.bits is 5; it must be one of 2, 2.5, 3, 3.5, 4"),
        ({"bits": True}, "turboquant.bits is True"),
        ({"k_bits": "4"}, "turboquant.k_bits is '4'"),
        ({"k_bits": "raw"}, "turboquant.k_bits is 'raw'"),
        ({"v_bits": 16}, "turboquant.v_bits is 16; it must be one of 2, 2.5, 3, 3.5, 4 or 'raw'"),
        ({"compress_v": 0}, "turboquant.compress_v is 0; it must be true or false"),
        ({"compress_v": False, "v_bits": 2}, "turboquant.compress_v is false and turboquant.v_bits 2"),
        ({"boundary_layers": -1}, "turboquant.boundary_layers is -1"),
        ({"boundary": {"k_bits": 2}}, "turboquant.boundary is given without turboquant.boundary_layers"),
        ({"boundary": "bf16"}, "turboquant.boundary is 'bf16'; it must be 'uncompressed' or an object"),
        ({"layers": [4]}, "turboquant.layers is \\[4\\]"),
        ({"layers": {"first": {"k_bits": 4}}}, "keys are layer indices such as 0 or -1"),
        ({"layers": {"0": {"k_bits": 7}}}, "turboquant.layers.0.k_bits is 7"),
        ({"layers": {"0": {"bits": 4}}}, "an object of k_bits and v_bits"),
        ({"key_scale": "norms"}, "it must be one of unbiased, least_squares, renorm, norm, searched"),
        ({"value_scale": 1}, "turboquant.value_scale is 1"),
        ({"shaped": True}, "turboquant.shaped: the plug-in has no shaped codes"),
        ({"key_centers": "/nowhere"}, "is no file on this machine"),
        ({"seed": -1}, r"it must be an integer in \[0, 2\*\*64\)"),
        ({"provider": ""}, "turboquant.provider is ''"),
        ({"prefill": "fast"}, "it must be one of raw, packed"),
        ({"sink_tokens": -1}, "turboquant.sink_tokens is -1; it must be a number of tokens"),
        ({"recent_tokens": "8"}, "turboquant.recent_tokens is '8'"),
        (4, "must be an object of options"),
    ],
)
def test_mistakes_are_refused(given: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        read(given)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"TURBOQUANT_BITS": "8"}, "TURBOQUANT_BITS is 8.0; it must be one of 2, 2.5, 3, 3.5, 4"),
        ({"TURBOQUANT_BITS": "four"}, "TURBOQUANT_BITS is 'four'"),
        ({"TURBOQUANT_COMPRESS_V": "no"}, "TURBOQUANT_COMPRESS_V is 'no'; it must be 0 or 1"),
    ],
)
def test_mistakes_in_the_environment_are_refused(environment: dict[str, str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        read(**environment)


def test_everything_else_is_taken_over(tmp_path: Path) -> None:
    centers = tmp_path / "centers.safetensors"
    centers.touch()
    given = {"key_scale": "renorm", "value_scale": "norm", "seed": 7, "provider": "triton", "prefill": "packed"}
    options = read({**given, "key_centers": str(centers)})
    assert {name: getattr(options, name) for name in given} == given
    assert options.key_centers == centers
