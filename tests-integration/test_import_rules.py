"""core <- triton, core <- hf, core <- vllm and nothing else; importing loads nothing heavy and touches no device."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = ["triton", "vllm"]
ALLOWED = {
    "turboquant_core": [],
    "turboquant_triton": ["turboquant_core"],
    # triton: Transformers starts torch's compiler, which looks whether triton is there.
    "turboquant_hf": ["turboquant_core", "transformers", "triton"],
    "turboquant_vllm": ["turboquant_core"],
}
WATCHED = [*ALLOWED, *HEAVY, "transformers"]
PROBE = """
import json, sys
for name in {absent}:
    sys.modules[name] = None
import {module}
torch = sys.modules.get("torch")
print(json.dumps({{
    "loaded": [name for name in {watched} if sys.modules.get(name)],
    "cuda": bool(torch and torch.cuda.is_initialized()),
}}))
"""


def run(code: str) -> dict[str, object]:
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("module", ALLOWED)
def test_import_loads_only_what_the_architecture_allows(module: str) -> None:
    seen = run(PROBE.format(module=module, watched=WATCHED, absent=[]))
    assert set(seen["loaded"]) - {module} <= set(ALLOWED[module])
    assert not seen["cuda"]


@pytest.mark.parametrize("module", ALLOWED)
def test_import_needs_no_package_outside_the_rules(module: str) -> None:
    absent = [name for name in WATCHED if name != module and name not in {*ALLOWED[module]} - {"triton"}]
    seen = run(PROBE.format(module=module, watched=WATCHED, absent=absent))
    assert module in seen["loaded"]


def test_looking_for_providers_loads_none() -> None:
    code = "import turboquant_core; turboquant_core.available_providers()\n"
    seen = run(code + PROBE.format(module="turboquant_core", watched=WATCHED, absent=[]))
    assert seen["loaded"] == ["turboquant_core"]


def test_layout_needs_no_torch() -> None:
    """What only computes sizes and offsets stays importable without the package's heavy dependencies."""
    code = """
import json, sys
from importlib.util import find_spec
from types import ModuleType
package = ModuleType("turboquant_core")
package.__path__ = list(find_spec("turboquant_core").submodule_search_locations)
sys.modules["turboquant_core"] = package
import turboquant_core.layout
print(json.dumps({"torch": "torch" in sys.modules}))
"""
    assert run(code) == {"torch": False}
