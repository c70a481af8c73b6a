"""An action that waits for a module."""

from __future__ import annotations

import importlib
import inspect
import sys
from pathlib import Path
from types import ModuleType

import pytest

from turboquant_vllm.importing import when_imported


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "awaited_module.py").write_text("VALUE = 3\n\n\ndef double(x):\n    return 2 * x\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "awaited_module", raising=False)
    return "awaited_module"


def test_the_action_runs_after_the_import_and_once(module: str) -> None:
    seen: list[ModuleType] = []
    finders = list(sys.meta_path)
    when_imported(module, seen.append)
    assert seen == []
    imported = importlib.import_module(module)
    importlib.import_module(module)
    assert seen == [imported]
    assert imported.VALUE == 3
    assert sys.meta_path == finders
    assert "def double" in inspect.getsource(imported.double)
    assert type(imported.__loader__) is type(imported.__spec__.loader)


def test_a_module_that_is_there_is_acted_on_now(module: str) -> None:
    imported = importlib.import_module(module)
    seen: list[ModuleType] = []
    when_imported(module, seen.append)
    assert seen == [imported]


def test_other_imports_are_not_touched(module: str) -> None:
    when_imported("a_module_that_nobody_imports", lambda _: pytest.fail("acted on the wrong module"))
    importlib.import_module(module)
    sys.meta_path.pop(0)
