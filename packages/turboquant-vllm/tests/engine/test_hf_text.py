"""The text of an engine is that of the Transformers integration on the same prompts: one format, one arithmetic."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .conftest import ENVIRONMENT, ROOT, TEXT, TINY, Engines

LAB = Path(os.environ.get("LAB_MODEL", ROOT / "LAB_MODEL-is-not-set"))
"""A larger trained model, which is not part of the repository: its folder is given by the environment."""
HF = Path(__file__).parent / "hf_text.py"
TOKENS = 24
PROMPTS = [TEXT[:600], TEXT[1000:1400], "The Congress shall have", TEXT[3000:3040]]
WHOLE: dict[str, Any] = {"max_num_batched_tokens": 2048, "enable_prefix_caching": False}
PLAIN: dict[str, Any] = {"recent_tokens": 0, "center_keys": False}
"""Options of the Transformers cache at which it stores and reads what the plug-in does without options."""


def transformers_text(model: Path, **cache: Any) -> dict[str, list[list[int]]]:
    """Tokens of the prompts and those that follow, one prompt at a time."""
    job = json.dumps({"model": str(model), "texts": PROMPTS, "tokens": TOKENS, "cache": cache})
    paths = [str(ROOT / "packages/turboquant-hf/src"), os.environ.get("PYTHONPATH", "")]
    environment = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run([sys.executable, str(HF), job], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, list[list[int]]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(
    ("model", "bits"),
    [
        (TINY, (4, 4)),
        pytest.param(TINY, (3, 4), marks=pytest.mark.slow),
        pytest.param(LAB, (4, 4), marks=pytest.mark.slow, id="larger-4"),
        pytest.param(LAB, (3, 3), marks=pytest.mark.slow, id="larger-3"),
    ],
    ids=lambda value: value.name if isinstance(value, Path) else None,
)
def test_equal_text(engines: Engines, model: Path, bits: tuple[float, float]) -> None:
    if not model.is_dir():
        pytest.skip(f"{model} is no folder; LAB_MODEL=FOLDER names a larger model")
    expected = transformers_text(model, bits=bits, **PLAIN)
    options = {"k_bits": bits[0], "v_bits": bits[1]}
    run = engines([expected["prompts"]], options, model=str(model), max_tokens=TOKENS, **WHOLE)
    assert run.tokens() == expected["written"]
