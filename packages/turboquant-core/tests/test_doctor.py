"""The doctor: statistics of planted vectors, and whole examinations of a trained model with planted faults."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from turboquant_core import cli, format_codebook
from turboquant_core.doctor import DoctorError, calibration_ids, default_text, examine, offset_bits, report, simulation
from turboquant_core.doctor.diagnosis import MAX_DIVERGENCE, SPARED_BITS, Diagnosis
from turboquant_core.doctor.simulation import Simulation, Treatment, divergence
from turboquant_core.doctor.statistics import codecs, describe
from turboquant_core.preset import load_preset
from turboquant_core.windows import Windows

TINY = Path(__file__).parents[3] / "examples" / "models" / "tiny"
TOKENS = 160
LOWEST_FREQUENCIES = (29, 30, 31, 61, 62, 63)
"""Coordinates of a key of 64 that rotary positions leave almost where they are."""


def vectors(heads: int = 2, tokens: int = 300, dim: int = 64) -> torch.Tensor:
    return torch.randn(heads, tokens, dim, generator=torch.Generator().manual_seed(0))


def test_offset_in_bits() -> None:
    """An offset of ``k`` standard deviations takes ``log2(1 + k**2) / 2`` bits."""
    x = vectors(tokens=4000)
    x[1] += 3.0
    got = offset_bits(x)
    assert float(got[0]) < 0.01
    assert float(got[1]) == pytest.approx(math.log2(10) / 2, rel=0.01)
    assert float(offset_bits(torch.ones(1, 5, 8))[0]) == pytest.approx(12)


def test_gaussian_vectors_have_the_codebooks_errors_less_what_the_search_saves() -> None:
    x = vectors(tokens=2000)
    for is_key, form in ((True, "int8"), (False, "cubic")):
        for head in describe(x, codecs(64, keys=is_key, device=x.device)):
            assert abs(head.kurtosis) < 0.15
            assert head.norm_spread < 1.3
            for bits in (2, 3, 4):
                expected = format_codebook(form, bits).mse  # type: ignore[arg-type]
                assert 0.75 * expected < head.errors[bits] < 1.15 * expected
            assert head.errors[4] < head.errors[3.5] < head.errors[3] < head.errors[2.5] < head.errors[2]


def test_planted_offset_first_token_and_loud_token_are_seen() -> None:
    x = vectors()
    x[0] += 4.0
    x[1, 0] *= 0.01
    x[1, 50:60] *= 20
    offset, plain = describe(x, codecs(64, keys=True, device=x.device))
    assert offset.offset_bits > 1.8
    assert offset.errors[4] > 8 * plain.errors[4]
    assert plain.first_norm < 0.05
    assert plain.norm_spread > 10


def test_fractional_bits_need_a_multiple_of_16() -> None:
    assert list(codecs(24, keys=True, device=torch.device("cpu"))) == [2, 3, 4]


def test_simulation_leaves_windows_and_unnamed_layers_exact() -> None:
    keys, values = vectors(tokens=50).unsqueeze(0), vectors(tokens=50).unsqueeze(0)
    simulation = Simulation(Treatment({0: (2, 3)}, windows=Windows(sink_tokens=4, recent_tokens=10)))
    assert simulation.read(1, keys, values) == (keys, values)
    got = simulation.read(0, keys, values)
    for coded, exact in zip(got, (keys, values), strict=True):
        assert torch.equal(coded[:, :, :4], exact[:, :, :4])
        assert torch.equal(coded[:, :, 40:], exact[:, :, 40:])
        assert not (coded[:, :, 4:40] == exact[:, :, 4:40]).any()
    short = simulation.read(0, keys[:, :, :14], values[:, :, :14])
    assert torch.equal(short[0], keys[:, :, :14])


def test_divergence() -> None:
    p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    assert divergence(p, p) == 0
    assert divergence(p, q) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))


# A trained model --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    transformers = pytest.importorskip("transformers")
    return calibration_ids(transformers.AutoTokenizer.from_pretrained(TINY), tokens=TOKENS)


def load(**changes: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.from_pretrained(TINY)
    for name, value in changes.items():
        setattr(config, name, value)
    plain = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    model = transformers.LlamaForCausalLM(config).float()
    model.load_state_dict(plain.state_dict(), strict=False)
    return model.eval()


@pytest.fixture(scope="module")
def healthy(ids: torch.Tensor) -> Diagnosis:
    return examine(load(), ids)


def test_a_healthy_model(healthy: Diagnosis) -> None:
    assert healthy.tokens == TOKENS
    assert [layer.index for layer in healthy.layers] == [0, 1, 2, 3]
    assert not healthy.left_out
    assert not any(layer.spared for layer in healthy.layers)
    by_bits = {verdict.bits: verdict for verdict in reversed(healthy.verdicts)}
    losses = [by_bits[pair].divergence for pair in ((2, 2), (3, 3), (4, 4))]
    assert losses[0] > 2 * losses[1] > 4 * losses[2]
    assert by_bits[2, 2].reason is not None
    assert by_bits[4, 4].reason is None
    assert healthy.refusal is None
    assert healthy.preset is not None
    assert healthy.preset.measured["divergence"] <= MAX_DIVERGENCE
    assert healthy.preset.bits[0] <= 4


def test_bits_given_out_by_cost_diverge_less_than_the_same_everywhere(healthy: Diagnosis) -> None:
    """This model's keys cost many times what its values cost, those of layer 1 most."""
    plain = [verdict for verdict in healthy.verdicts if not verdict.windows.recent_tokens]
    even = {verdict.bits: verdict for verdict in plain if not verdict.allocated}
    allocated = {verdict.bits: verdict for verdict in plain if verdict.allocated}
    assert set(allocated) == {(2.5, 2.5), (3, 3), (3.5, 3.5)}
    for bits, verdict in allocated.items():
        # At 3 bits the two are alike in so short a text.
        assert verdict.divergence < (1.25 if bits[0] == 3 else 0.9) * even[bits].divergence
        given = [verdict.layers.get(index, verdict.bits) for index in range(4)]
        assert sum(map(sum, given)) <= 8 * bits[0]
        assert max(given) == verdict.layers[1]
        assert f"{bits[0]:g}, {bits[1]:g}*" in report(healthy)


def test_the_report_shows_every_head_and_choice(healthy: Diagnosis) -> None:
    text = report(healthy)
    assert text.count("  K  ") == text.count("  V  ") == 8
    assert f"{healthy.verdicts[0].divergence:.4f}" in text
    assert f"unsafe: {healthy.verdicts[0].reason}" in text
    assert "recommended: keys" in text


def test_a_recommendation_says_what_it_does_not_rest_on(healthy: Diagnosis) -> None:
    *_, command = report(healthy).rstrip().split("\n")
    assert "not measured: retrieval" in report(healthy)
    assert command == "python benchmarks/retrieval.py MODEL_FOLDER PROMPTS --preset FILE"
    script = Path(__file__).parents[3] / command.split()[1]
    assert script.exists()
    assert '"--preset"' in script.read_text(encoding="utf-8")


def test_planted_key_biases_are_centred(ids: torch.Tensor, healthy: Diagnosis) -> None:
    model = load(attention_bias=True)
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            getattr(layer.self_attn, name).bias.data.zero_()
        layer.self_attn.k_proj.bias.data.view(2, 64)[:, LOWEST_FREQUENCIES] = 14.0
    found = examine(model, ids)
    for sick, well in zip(found.layers, healthy.layers, strict=True):
        assert min(head.offset_bits for head in sick.keys) > max(1.4, *(head.offset_bits for head in well.keys))
    assert found.probes["centred"] < 0.25 * found.probes["plain"]
    assert found.preset is not None
    assert sorted(found.preset.centers) == [0, 1, 2, 3]
    assert healthy.preset is not None
    moved = found.preset.centers[1] - healthy.preset.centers[1]
    assert ((moved[:, LOWEST_FREQUENCIES] - 14).abs() < 2).all()


def test_a_planted_outlier_layer_is_spared(ids: torch.Tensor) -> None:
    model = load()
    model.model.layers[3].self_attn.q_proj.weight.data *= 16
    found = examine(model, ids)
    assert [layer.index for layer in found.layers if layer.spared] == [3]
    assert found.preset is None or found.preset.layer_bits(3) == (SPARED_BITS, SPARED_BITS)
    assert "*" in report(found)


def test_without_windows_every_token_is_packed(ids: torch.Tensor) -> None:
    found = examine(load(), ids, windows=False)
    assert sorted(found.probes) == ["centred", "plain"]
    assert all(not verdict.windows for verdict in found.verdicts)
    assert found.preset is not None
    assert not found.preset.windows


def test_a_model_that_nothing_is_safe_for_is_refused(ids: torch.Tensor) -> None:
    found = examine(load(), ids, max_divergence=1e-6)
    assert found.preset is None
    assert found.refusal is not None
    assert "the limit is 1e-06" in found.refusal
    assert re.search(r"layer \d alone costs most, 0\.\d+ at 3 bits", found.refusal)
    assert "refused: no choice is safe for this model; at 4 bits it diverges by" in report(found)
    assert "not measured" not in report(found)


def test_a_model_without_finite_probabilities(ids: torch.Tensor) -> None:
    model = load()
    model.lm_head.weight.data[5] = torch.nan
    with pytest.raises(DoctorError, match="not finite"):
        examine(model, ids)


def test_sliding_layers_stay_as_they_are(ids: torch.Tensor) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen2Config(
        vocab_size=4096, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, use_sliding_window=True, sliding_window=32, max_window_layers=1,
    )  # fmt: skip
    found = examine(transformers.Qwen2ForCausalLM(config).eval(), ids)
    assert found.left_out == {1: "it is sliding_attention"}
    assert [layer.index for layer in found.layers] == [0]
    assert "layer 1 stays as it is: it is sliding_attention" in report(found)


def test_no_layer_to_pack(ids: torch.Tensor) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=4096, hidden_size=40, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, head_dim=20,
    )  # fmt: skip
    with pytest.raises(DoctorError, match="no layer can be packed: head_dim is 20"):
        examine(transformers.LlamaForCausalLM(config).eval(), ids)


def test_short_text(ids: torch.Tensor) -> None:
    with pytest.raises(DoctorError, match=r"the text is \(1, 50\) tokens; give \[1, at least 128\]"):
        examine(None, ids[:, :50])


# The command ------------------------------------------------------------------------------------------------------


def test_command_writes_a_preset(tmp_path: Path, capsys: pytest.CaptureFixture[str], ids: torch.Tensor) -> None:
    out, text = tmp_path / "preset.json", tmp_path / "text.txt"
    text.write_text(default_text()[:3000])
    arguments = ["doctor", str(TINY), "--tokens", str(ids.shape[1]), "--text", str(text), "--out", str(out)]
    assert cli.main(arguments) == cli.SAFE
    shown = capsys.readouterr().out
    assert "recommended: keys" in shown
    assert f"written to {out}" in shown
    preset = load_preset(out)
    assert preset.model.layers == 4
    assert preset.bits[0] <= 4


def test_command_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str], ids: torch.Tensor) -> None:
    out = tmp_path / "preset.json"
    arguments = [
        "doctor",
        str(TINY),
        "--tokens",
        str(ids.shape[1]),
        "--max-divergence",
        "1e-9",
        "--no-windows",
        "--out",
        str(out),
    ]
    assert cli.main(arguments) == cli.REFUSED
    assert "refused" in capsys.readouterr().out
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere/model"], "nowhere/model is no folder, and nothing is downloaded here: give the folder of a model"),
        (["."], "has no config.json: give the folder that a model was saved to"),
        (["broken"], "broken cannot be loaded: "),
        ([str(TINY), "--text", "none.txt"], "--text none.txt cannot be read"),
        ([str(TINY), "--out", "."], "--out . is a folder: name a file in it, such as preset.json"),
        ([str(TINY), "--out", "none/preset.json"], "--out none/preset.json: there is no folder none: create it"),
        ([str(TINY), "--device", "nowhere"], "--device nowhere cannot be used: "),
        ([str(TINY), "--device", "meta:x"], "--device meta:x cannot be used: "),
    ],
    ids=lambda value: " ".join(value[-2:]).replace(str(TINY), "") if isinstance(value, list) else "",
)
def test_wrong_arguments_are_one_line_before_anything_is_measured(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "examine", lambda *arguments, **options: pytest.fail("measured"))
    assert cli.main(["doctor", *arguments]) == cli.MISUSED == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("turboquant: ")
    assert message in line
    assert os.listdir(tmp_path) == ["broken"]


def test_a_file_that_may_not_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli.os, "access", lambda path, mode: path != tmp_path)
    assert cli.main(["doctor", str(TINY), "--out", str(tmp_path / "preset.json")]) == cli.MISUSED
    assert "preset.json may not be written" in capsys.readouterr().err


@pytest.fixture
def without_transformers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    simulation.transformers.cache_clear()
    monkeypatch.setattr(simulation.importlib, "import_module", refuse)
    yield
    simulation.transformers.cache_clear()


@pytest.mark.usefixtures("without_transformers")
def test_without_transformers(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", str(TINY)]) == cli.FAILED
    shown = capsys.readouterr().err
    assert "the doctor runs models with Transformers (No module named 'transformers')" in shown
    assert shown.endswith("pip install 'transformers>=5.5'\n")


@pytest.mark.parametrize("version", ["4.57.1", "5.4.9"])
@pytest.mark.usefixtures("without_transformers")
def test_with_transformers_that_are_too_old(
    version: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    library = SimpleNamespace(__version__=version)
    monkeypatch.setattr(simulation.importlib, "import_module", lambda _: library)
    assert cli.main(["doctor", str(TINY)]) == cli.FAILED
    assert f"Transformers is {version}, too old" in capsys.readouterr().err
