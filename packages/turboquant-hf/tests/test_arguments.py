"""What is no model, no configuration or no option: one clear error each, before anything is run."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from turboquant_hf import (
    TurboQuantCache,
    TurboQuantStaticCache,
    check_model_compatibility,
    measure_shaping,
    patch_model,
    presets,
    turboquant,
    unpatch_model,
    verify_model,
)
from turboquant_hf.arguments import option_names

from .conftest import CONFIGS, GQA

ROOT = Path(__file__).parents[3]


def enter(model: Any, *arguments: Any, **options: Any) -> None:
    with turboquant(model, *arguments, **options):
        pass


def verify(model: Any) -> None:
    verify_model(model, lambda: pytest.fail("made a cache"))


def measure(model: Any) -> None:
    measure_shaping(model, torch.zeros(1, 2, dtype=torch.int64))


TAKE_A_MODEL = [patch_model, enter, check_model_compatibility, unpatch_model, verify, measure]
NO_MODEL: dict[str, tuple[Any, str]] = {
    "path": (
        "models/llama",
        r"model is the string 'models/llama': pass a loaded .*AutoModelForCausalLM\.from_pretrained",
    ),
    "none": (None, "model is None: pass a loaded Transformers model"),
    "config": (LlamaConfig(**GQA), "model is a LlamaConfig: pass the model that has this configuration"),
    "class": (LlamaForCausalLM, "model is the class LlamaForCausalLM: pass a loaded"),
    "module": (torch.nn.Linear(2, 2), "model is a Linear without a Transformers configuration"),
}


@pytest.mark.parametrize("function", TAKE_A_MODEL, ids=lambda function: function.__name__)
@pytest.mark.parametrize("what", NO_MODEL)
def test_what_is_no_model(function: Callable[..., Any], what: str) -> None:
    value, message = NO_MODEL[what]
    with pytest.raises(ValueError, match=message):
        function(value)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ("text", r"calibration is the string 'text': pass token ids, such as tokenizer\(text, return_tensors='pt'\)"),
        ([[1, 2]], "calibration is a list: pass token ids"),
        (
            torch.ones(3, dtype=torch.int64),
            r"calibration is torch\.int64 \(3,\): pass token ids, integers \[batch, tokens",
        ),
        (torch.ones(1, 3), r"calibration is torch\.float32 \(1, 3\)"),
    ],
)
@pytest.mark.parametrize("options", [{"bits": "auto"}, {"shaped": True}], ids=str)
def test_what_are_no_token_ids(llama: Any, ids: Any, message: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        patch_model(llama, calibration=ids, **options)


@pytest.mark.parametrize("make", [TurboQuantCache, lambda config: TurboQuantStaticCache(config, 64)])
def test_what_is_no_configuration(make: Callable[..., Any], llama: Any) -> None:
    with pytest.raises(ValueError, match=r"config is a LlamaForCausalLM: pass model\.config"):
        make(llama)
    with pytest.raises(ValueError, match="config is the string 'models/llama': pass the config of a loaded"):
        make("models/llama")
    with pytest.raises(ValueError, match="config is None"):
        make(None)


def test_a_configuration_by_name(llama: Any) -> None:
    assert TurboQuantCache(config=llama.config, bits=3).options.bits == 3


@pytest.mark.parametrize("function", [patch_model, enter])
def test_an_option_that_does_not_exist(
    function: Callable[..., Any], llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a doctor has measured for minutes."""
    monkeypatch.setattr(presets, "measured_preset", lambda *arguments: pytest.fail("measured"))
    known = "its options are bits, max_cache_len, .*calibration, verify, compress_v, .*offload_only_non_sliding$"
    if function is patch_model:
        known = known.replace(".*calibration, verify", "verify, calibration")
    with pytest.raises(TypeError, match=f"no option 'recent_token': did you mean 'recent_tokens'. {known}"):
        function(llama, "auto", recent_token=4)
    assert llama.config._attn_implementation == "sdpa"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_offloading_without_a_device(llama: Any) -> None:
    for make in (lambda **options: TurboQuantCache(llama.config, **options), partial(patch_model, llama)):
        with pytest.raises(ValueError, match=r"offloading keeps layers .* and there is none"):
            make(offloading=True)
    assert llama.config._attn_implementation == "sdpa"


def test_a_cache_names_its_options(llama: Any) -> None:
    with pytest.raises(
        TypeError, match=r"TurboQuantCache has no option 'nbits': did you mean 'bits'\? its options are"
    ):
        TurboQuantCache(llama.config, nbits=4)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"TurboQuantStaticCache has no option 'offloading': its options are max_cache"):
        patch_model(llama, max_cache_len=64, offloading=True)
    with pytest.raises(TypeError, match="TurboQuantCache has no option 'xyz': its options are bits, compress_v"):
        check_model_compatibility(llama, xyz=1)


@pytest.mark.parametrize("function", [patch_model, lambda model, bits: TurboQuantCache(model.config, bits)])
@pytest.mark.parametrize("bits", ["4", " 3.5"])
def test_a_number_in_a_string(function: Callable[..., Any], llama: Any, bits: str) -> None:
    with pytest.raises(ValueError, match=rf"bits is '{bits}', a string: pass a number, one of \(2, 2\.5, 3, 3\.5, 4\)"):
        function(llama, bits)


def test_a_cache_takes_no_preset() -> None:
    for bits in ("auto", Path("preset.json")):
        with pytest.raises(ValueError, match="a cache takes numbers; patch_model and turboquant take presets"):
            TurboQuantCache(CONFIGS["llama"][0], bits)  # type: ignore[arg-type]


@pytest.mark.parametrize("page", ["docs/hf.md", "packages/turboquant-hf/README.md"])
def test_every_option_is_in_the_tables(page: str) -> None:
    rows = [line.split("|")[1] for line in (ROOT / page).read_text().splitlines() if line.startswith("| `")]
    shown = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    functions = (TurboQuantCache.__init__, TurboQuantStaticCache.__init__, patch_model, turboquant)
    assert {name for function in functions for name in option_names(function)} <= shown
