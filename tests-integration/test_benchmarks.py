"""The benchmarks that have a quick mode run in it, and their files say what was run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from turboquant_core import VectorLayout
from turboquant_hf.options import RECENT_TOKENS

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

from contenders import Contender  # noqa: E402
from decode_modes import one_graph  # noqa: E402
from decode_steps import WARM_UP  # noqa: E402
from decode_targets import targets  # noqa: E402
from transformers_decode import QUICK_SHAPE, attempt, random_model  # noqa: E402

SIZES = ("num_key_value_heads", "num_hidden_layers", "head_dim")


def run(script: str, *arguments: str) -> str:
    """Output of a benchmark; its end is in the assertion when it fails."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, f"benchmarks/{script}", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def decoding(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """Output and JSON of the shortest run of ``transformers_decode.py``."""
    target = tmp_path_factory.mktemp("decoding") / "decode.json"
    arguments = ("--quick", "--device", "cpu", "--steps", "2", "--cases", "1x64", "--backend", "eager")
    return run("transformers_decode.py", *arguments, "--json", str(target)), json.loads(target.read_text())


def test_decoding_of_transformers_caches(decoding: tuple[str, dict[str, Any]]) -> None:
    output, written = decoding
    assert written["command"].startswith("python benchmarks/transformers_decode.py --quick")
    rows = {row["cache"]: row for row in written["results"]["rows"]}
    assert set(rows) <= {line.split(" | ")[1] for line in output.splitlines() if line.startswith("| 1 x")}
    kv_heads, layers, head_dim = (written["results"]["shape"][name] for name in SIZES)
    stock = 2 * kv_heads * layers * head_dim * 2  # bytes of a token in bf16
    tokens = rows["DynamicCache bf16"]["kv_bytes"] / stock
    for bits in (4, 3, 2):
        row = rows[f"turboquant {bits} bit"]
        packed = 2 * kv_heads * layers * VectorLayout(head_dim, bits, "int8").nbytes
        assert row["tokens_per_second"] == 1 / row["median_step_seconds"] > 0
        assert (row["untimed_steps"], row["timed_steps"], row["compiled_later"]) == (WARM_UP, 2, [])
        assert row["kv_bytes"] == (tokens - RECENT_TOKENS) * packed + RECENT_TOKENS * stock


@pytest.mark.parametrize("cache", ["StaticCache bf16", "turboquant 4 bit"])
def test_compiled_steps_and_why_graphs_are_not_recorded(cache: str, decoding: tuple[str, dict[str, Any]]) -> None:
    output, written = decoding
    rows = {row["cache"]: row for row in written["results"]["rows"]}
    compiled = rows[f"{cache}, compiled"]
    assert compiled["tokens_per_second"] > 0
    # The first step compiles.
    assert compiled["first_step_seconds"] > 1 / compiled["tokens_per_second"]
    assert compiled["kv_bytes"] > 0
    assert rows[f"{cache}, CUDA graphs"]["reason"] == "CUDA graphs need a CUDA device, this is 'cpu'"
    assert f"| {cache}, CUDA graphs | - | - | - | - | - | - | CUDA graphs need a CUDA device" in output


def test_a_step_that_compiles_again_has_no_figures() -> None:
    def forward(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    with one_graph(SimpleNamespace(forward=forward), "compiled", "eager") as step:
        step(torch.ones(2))
        with pytest.raises(torch._dynamo.exc.RecompileError):
            step(torch.ones(3))


def test_no_memory_is_a_reason_and_not_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def prepare(model: Any, room: int) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nGPU 0 has ...")
        yield

    model = random_model(QUICK_SHAPE, torch.device("cpu"))
    row = attempt(model, Contender("greedy", prepare, mode="compiled"), torch.ones(1, 4), 1, "eager")
    assert row == {"reason": "OutOfMemoryError: CUDA out of memory. Tried to allocate 9 GiB."}


@pytest.mark.parametrize("name", ["optimum-quanto", "hqq", "fused-turboquant"])
def test_an_absent_rival_is_named(name: str, decoding: tuple[str, dict[str, Any]]) -> None:
    try:
        pytest.skip(f"{name} {version(name)} is installed")
    except PackageNotFoundError:
        assert f"{name} is not installed" in decoding[0]


def test_figures_of_a_gpu_are_not_made_on_a_cpu() -> None:
    with pytest.raises(AssertionError, match="no CUDA device"):
        run("transformers_decode.py", "--device", "cpu")


def test_targets_of_decoding_are_those_that_rows_decide() -> None:
    case = {"batch": 1, "context": 32768}
    rows = [
        case | {"cache": "DynamicCache bf16", "tokens_per_second": 10.0, "kv_bytes": 100, "decode_peak_bytes": 500},
        case | {"cache": "turboquant 4 bit", "tokens_per_second": 8.0, "kv_bytes": 20, "decode_peak_bytes": 430},
        case | {"cache": "turboquant 2 bit", "reason": "OutOfMemoryError"},
        case | {"cache": "QuantizedCache hqq 4 bit", "tokens_per_second": 1.0, "kv_bytes": None},
        {"batch": 1, "context": 4096, "cache": "DynamicCache bf16", "tokens_per_second": 10.0, "kv_bytes": 10},
        {"batch": 1, "context": 4096, "cache": "turboquant 4 bit", "tokens_per_second": 10.0, "kv_bytes": 2},
        {"batch": 1, "context": 4096, "cache": "QuantizedCache fp8", "tokens_per_second": 1.0, "kv_bytes": None},
        {"batch": 1, "context": 4096, "cache": "StaticCache bf16, compiled", "tokens_per_second": 40.0, "kv_bytes": 10},
        {"batch": 1, "context": 4096, "cache": "turboquant 4 bit, compiled", "tokens_per_second": 30.0, "kv_bytes": 2},
        {
            "batch": 1,
            "context": 4096,
            "cache": "turboquant 4 bit, CUDA graphs",
            "tokens_per_second": 9.0,
            "kv_bytes": 2,
        },
    ]
    found = [(row["target"], row["case"], row["least"], row["found"], row["met"]) for row in targets(rows)]
    assert found == [
        ("peak memory saved, of the KV saving", "1 x 32768", 0.95, 0.875, False),
        ("speed to QuantizedCache hqq 4 bit", "1 x 32768", 5.0, 8.0, True),
        ("speed to DynamicCache bf16", "1 x 4096", 1.0, 1.0, True),
        ("speed to QuantizedCache fp8", "1 x 4096", 5.0, 10.0, True),
        # Against the ordinary cache whose steps are run in the same way, if there is one.
        ("speed to StaticCache bf16, compiled", "1 x 4096", 1.0, 0.75, False),
        # Whose steps have no other way.
        ("speed to QuantizedCache fp8, eager", "1 x 4096", 5.0, 30.0, True),
        ("speed to QuantizedCache fp8, eager", "1 x 4096", 5.0, 9.0, True),
    ]


def test_the_ratios_of_a_quick_run_are_in_its_file(decoding: tuple[str, dict[str, Any]]) -> None:
    output, written = decoding
    compared = {row["target"] for row in written["results"]["targets"]}
    assert "speed to QuantizedCache fp8" in compared
    assert all(f"| {name} |" in output for name in compared)
