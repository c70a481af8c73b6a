"""The entry point says plainly what it does not do, once, and imports nothing heavy."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points

import pytest

from turboquant_vllm import register


@pytest.fixture(autouse=True)
def _fresh_process_state() -> Iterator[None]:
    register.cache_clear()
    yield
    register.cache_clear()


def test_register_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="turboquant_vllm"):
        register()
        register()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "FUSED_TURBOQUANT" in record.getMessage()
    assert "no attention backend yet" in record.getMessage()


def test_the_warning_reaches_a_user_without_logging_set_up() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import turboquant_vllm; turboquant_vllm.register()"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "FUSED_TURBOQUANT" in done.stderr


def test_vllm_finds_the_plug_in_by_entry_point() -> None:
    (entry,) = entry_points(group="vllm.general_plugins", name="fused_turboquant")
    assert entry.load() is register


def test_registering_imports_nothing_heavy() -> None:
    code = (
        "import sys, turboquant_vllm; turboquant_vllm.register();"
        "print([name for name in ('torch', 'triton', 'transformers', 'vllm') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
