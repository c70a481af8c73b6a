"""The entry point: found by vLLM, quiet about what it does, harmless where it can do nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from importlib.util import find_spec
from typing import Any

import pytest

from turboquant_vllm import register

needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")


def run(program: str, **environment: str) -> tuple[Any, str]:
    """What a program prints last, as JSON, and its error output, the log of any vLLM included."""
    variables = {**os.environ, "VLLM_LOGGING_STREAM": "ext://sys.stderr", **environment}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=variables)
    return json.loads(done.stdout.strip().splitlines()[-1]), done.stderr


def test_vllm_finds_the_plug_in_by_entry_point() -> None:
    (entry,) = entry_points(group="vllm.general_plugins", name="turboquant")
    assert entry.load() is register


def test_importing_loads_nothing_heavy() -> None:
    program = (
        "import sys, json, turboquant_vllm\n"
        "print(json.dumps([n for n in ('torch', 'triton', 'transformers', 'vllm') if n in sys.modules]))"
    )
    assert run(program)[0] == []


def test_without_vllm_it_says_so_once_and_raises_nothing() -> None:
    program = (
        "import sys, json\n"
        "sys.modules['vllm'] = None\n"
        "import importlib.util; importlib.util.find_spec = lambda name: None\n"
        "import turboquant_vllm.plugin as p; p.find_spec = importlib.util.find_spec\n"
        "p.register(); p.register(); print(json.dumps('torch' in sys.modules))"
    )
    loaded, errors = run(program)
    assert loaded is False
    assert errors.count("FUSED_TURBOQUANT is not available, vLLM runs unchanged: vLLM is not installed") == 1


def test_a_failure_inside_is_a_warning() -> None:
    program = (
        "import json, turboquant_vllm.plugin as p\n"
        "def fail(): raise RuntimeError('broken')\n"
        "p._register = fail; p.register(); print(json.dumps(True))"
    )
    assert "vLLM runs unchanged: RuntimeError('broken')" in run(program)[1]


@needs_vllm
def test_registering_adds_one_name_and_imports_neither_layers_nor_kernels() -> None:
    program = (
        "import sys, json, logging\n"
        "from vllm.v1.attention.backends.registry import AttentionBackendEnum as E\n"
        "before = list(E.__members__)\n"
        "import turboquant_vllm as t; t.register(); t.register.cache_clear(); t.register()\n"
        "heavy = ('vllm.model_executor.layers.attention.attention', 'turboquant_triton')\n"
        "loaded = [n for n in heavy if n in sys.modules]\n"
        "print(json.dumps([[n for n in E.__members__ if n not in before], E['FUSED_TURBOQUANT'].get_path(),\n"
        "                  E.CUSTOM.get_path(), E.TURBOQUANT.is_overridden(), loaded]))"
    )
    path = "turboquant_vllm.backend.FusedTurboQuantBackend"
    assert run(program)[0] == [["FUSED_TURBOQUANT"], path, path, False, []]


@needs_vllm
def test_custom_is_left_to_whoever_has_it() -> None:
    program = (
        "import json\n"
        "from vllm.v1.attention.backends.registry import AttentionBackendEnum as E, register_backend\n"
        "register_backend(E.CUSTOM, 'somebody.Backend')\n"
        "import turboquant_vllm; turboquant_vllm.register(); print(json.dumps(E.CUSTOM.get_path()))"
    )
    assert run(program)[0] == "somebody.Backend"


@needs_vllm
def test_the_member_survives_a_process_that_has_not_registered_it() -> None:
    program = (
        "import json, pickle\n"
        "from vllm.v1.attention.backends.registry import AttentionBackendEnum as E\n"
        "import turboquant_vllm; turboquant_vllm.register()\n"
        "print(json.dumps(pickle.dumps([E['FUSED_TURBOQUANT'], E.FLASH_ATTN]).hex()))"
    )
    payload = run(program)[0]
    other = f"import json, pickle; print(json.dumps([m.name for m in pickle.loads(bytes.fromhex({payload!r}))]))"
    assert run(other)[0] == ["FUSED_TURBOQUANT", "FLASH_ATTN"]


@needs_vllm
def test_native_cache_types_are_taken_over_on_request() -> None:
    program = (
        "import json\n"
        "from vllm.v1.attention.backends.registry import AttentionBackendEnum as E\n"
        "import turboquant_vllm; turboquant_vllm.register(); print(json.dumps(E.TURBOQUANT.get_path()))"
    )
    taken = run(program, TURBOQUANT_OVERRIDE_NATIVE="1")[0]
    assert taken == "turboquant_vllm.backend.TakeoverBackend"


@needs_vllm
@pytest.mark.parametrize(
    ("lacking", "reason"),
    [
        ("from vllm.v1.attention import backend as m; del m.AttentionBackend", "are not where they are since 0.20"),
        (
            "from vllm.v1 import kv_cache_interface as k; from vllm.v1.attention.backend import AttentionBackend as b\n"
            "vars(k).pop('TQFullAttentionSpec', None); hasattr(b, 'customize_spec') and delattr(b, 'customize_spec')",
            "no backend can give its pages a size of its own",
        ),
    ],
)
def test_a_vllm_that_lacks_what_is_needed_runs_unchanged_and_is_told_why(lacking: str, reason: str) -> None:
    program = (
        f"import json\n{lacking}\n"
        "import turboquant_vllm; turboquant_vllm.register()\n"
        "from vllm.v1.attention.backends.registry import AttentionBackendEnum as E\n"
        "print(json.dumps('FUSED_TURBOQUANT' in E.__members__))"
    )
    registered, errors = run(program)
    assert not registered
    assert "FUSED_TURBOQUANT is not available, vLLM runs unchanged: this vLLM is too old or too new for it" in errors
    assert reason in errors


@needs_vllm
def test_a_wrong_value_of_the_takeover_is_told() -> None:
    program = (
        "import json\n"
        "from vllm.v1.attention.backends.registry import AttentionBackendEnum as E\n"
        "import turboquant_vllm; turboquant_vllm.register()\n"
        "print(json.dumps([E.TURBOQUANT.is_overridden(), 'FUSED_TURBOQUANT' in E.__members__]))"
    )
    found, errors = run(program, TURBOQUANT_OVERRIDE_NATIVE="true")
    assert found == [False, True]
    assert "TURBOQUANT_OVERRIDE_NATIVE is 'true'; it must be 0 or 1: vLLM's own turboquant_* cache types" in errors
