"""Where the sessions of noxfile.py take torch from (a CPU build or an error), and what a release wants of its tag."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

ROOT = Path(__file__).parents[1]
CPU_INDEX = ["--extra-index-url", "https://download.pytorch.org/whl/cpu"]
PIP = """#!{python}
import sys
assert sys.argv[1:7] == ["-m", "pip", "--retries", "1", "index", "versions"], sys.argv
found = {there!r} if "--extra-index-url" in sys.argv else {here!r}
print("torch (9.9.9)\\nAvailable versions: " + ", ".join(found))
"""


class SessionError(Exception):
    """What a session raises to fail."""


@pytest.fixture
def noxfile(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, without nox: its sessions are plain functions."""
    monkeypatch.chdir(ROOT)
    nox = MagicMock()
    nox.session.side_effect = lambda *function, **_: function[0] if function else lambda undecorated: undecorated
    nox.parametrize.return_value = lambda undecorated: undecorated
    monkeypatch.setitem(sys.modules, "nox", nox)
    monkeypatch.delenv("TORCH_INDEX", raising=False)
    spec = importlib.util.spec_from_file_location("noxfile", ROOT / "noxfile.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module.sys, "platform", "linux")
    return module


def session(folder: Path, here: list[str], there: list[str]) -> Any:
    """A session whose pip finds versions of torch ``here``, and ``there`` with an index more."""
    pip = folder / "python"
    pip.write_text(PIP.format(python=sys.executable, here=here, there=there))
    pip.chmod(0o755)
    return MagicMock(bin=str(folder), error=MagicMock(side_effect=SessionError))


def test_the_build_that_pip_is_configured_with(noxfile: Any, tmp_path: Path) -> None:
    pinned = noxfile.pinned("torch")
    found = noxfile.cpu_torch(session(tmp_path, [pinned, f"{pinned}+cpu"], []), noxfile.CONSTRAINTS)
    assert found == [f"torch=={pinned}+cpu"]


def test_else_the_index_of_pytorch(noxfile: Any, tmp_path: Path) -> None:
    pinned = noxfile.pinned("torch")
    found = noxfile.cpu_torch(session(tmp_path, [pinned], [pinned, f"{pinned}+cpu"]), noxfile.CONSTRAINTS)
    assert found == [*CPU_INDEX, f"torch=={pinned}+cpu"]


@pytest.mark.parametrize("there", [[], ["{}"], ["{}+cpu.cxx11", "1{}+cpu"]], ids=["no index", "cuda", "others"])
def test_else_an_error(noxfile: Any, tmp_path: Path, there: list[str]) -> None:
    pinned = noxfile.pinned("torch")
    given = session(tmp_path, [pinned], [version.format(pinned) for version in there])
    with pytest.raises(SessionError):
        noxfile.cpu_torch(given, noxfile.CONSTRAINTS)
    assert "set TORCH_INDEX" in given.error.call_args[0][0]


def test_the_version_of_other_constraints(noxfile: Any, tmp_path: Path) -> None:
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("torch==1.2.3\n")
    given = session(tmp_path, ["1.2.3+cpu"], [])
    assert noxfile.cpu_torch(given, constraints) == ["torch==1.2.3+cpu"]


@pytest.mark.parametrize(("index", "expected"), [("", []), ("https://x.test", ["--extra-index-url", "https://x.test"])])
def test_an_index_that_is_named_is_taken(
    noxfile: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, index: str, expected: list[str]
) -> None:
    monkeypatch.setenv("TORCH_INDEX", index)
    assert noxfile.cpu_torch(session(tmp_path, [], []), noxfile.CONSTRAINTS) == expected


def test_elsewhere_the_default_build_is_one_for_cpus(
    noxfile: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(noxfile.sys, "platform", "darwin")
    assert noxfile.cpu_torch(session(tmp_path, [], []), noxfile.CONSTRAINTS) == []


@pytest.fixture
def package(noxfile: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of core at version 1.2.3, below the working folder."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "packages" / "turboquant-core"
    module = path / "src" / "turboquant_core" / "_version.py"
    module.parent.mkdir(parents=True)
    module.write_text('__version__ = "1.2.3"\n')
    (path / "CHANGELOG.md").write_text("# Changelog\n\n## 1.2.3 (2026-12-01)\n")
    return path


def releasing(*tag: str) -> Any:
    """A session of ``nox -s release -- TAG``."""
    return MagicMock(posargs=list(tag), error=MagicMock(side_effect=SessionError))


def test_a_release_tests_the_wheel_of_its_package(noxfile: Any, package: Path) -> None:
    given = releasing("turboquant-core-v1.2.3")
    noxfile.release(given)
    given.notify.assert_called_once_with("smoke(core)", posargs=())


@pytest.mark.parametrize(
    ("tag", "message"),
    [
        ((), "no tag"),
        (("v1.2.3",), "tags are"),
        (("turboquant-metal-v1.2.3",), "tags are"),
        (("turboquant-core-v1.2",), "tags are"),
        (("turboquant-core-v1.2.4",), "_version.py says 1.2.3"),
    ],
)
def test_a_tag_that_names_no_release(noxfile: Any, package: Path, tag: tuple[str, ...], message: str) -> None:
    given = releasing(*tag)
    with pytest.raises(SessionError):
        noxfile.release(given)
    assert message in given.error.call_args[0][0]


def test_a_release_is_in_the_changelog(noxfile: Any, package: Path) -> None:
    (package / "CHANGELOG.md").write_text("# Changelog\n\n## Unreleased\n\n## 1.2.30\n")
    given = releasing("turboquant-core-v1.2.3")
    with pytest.raises(SessionError):
        noxfile.release(given)
    assert "no section 1.2.3" in given.error.call_args[0][0]
