"""What the sweep found when it was last written, by release of Transformers, and how a new run differs."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import transformers

from .row import Row

FOLDER = Path(__file__).parent / "expected"
MULTIMODAL = Path(__file__).parent / "expected_multimodal"
COMPARED = tuple(field.name for field in fields(Row) if "reasons" not in field.name and field.name != "refused")
"""Messages of errors and names of operators differ between releases of Python and torch; whether there is one not."""


def _key(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:3] if part.isdigit())


def _files(folder: Path) -> list[Path]:
    """From the oldest release to the newest."""
    return sorted(folder.glob("*.json"), key=lambda path: _key(path.stem))


def _installed(folder: Path) -> Path:
    """The file of the newest release that is not newer than the one installed."""
    files = _files(folder)
    older = [path for path in files if _key(path.stem) <= _key(transformers.__version__)]
    return older[-1] if older else files[0]


def newest_file(folder: Path = FOLDER) -> Path:
    """The file of the newest release, which the documentation shows."""
    return _files(folder)[-1]


def read_rows(path: Path) -> dict[str, Row]:
    """Rows by model type."""
    return {name: Row(name, **record) for name, record in json.loads(path.read_text()).items()}


def expected_rows(folder: Path = FOLDER) -> dict[str, Row]:
    """What the installed release is expected to give."""
    return read_rows(_installed(folder))


def write_rows(found: dict[str, Row], *, replace_all: bool, folder: Path = FOLDER) -> None:
    """Make ``found`` the expectation of the installed release; other rows stay unless ``replace_all``."""
    path = folder / f"{transformers.__version__}.json"
    kept = {} if replace_all or not path.exists() else read_rows(path)
    folder.mkdir(exist_ok=True)
    _write(path, {**kept, **found})


def _write(path: Path, rows: dict[str, Row]) -> None:
    records = {name: row.record() for name, row in sorted(rows.items())}
    for record in records.values():
        del record["model_type"]
    path.write_text(json.dumps(records, indent=1, ensure_ascii=False) + "\n")


def _kind(outcome: str) -> str:
    return outcome.split(":")[0]


def _comparable(row: Row) -> dict[str, object]:
    plain = {name: getattr(row, name) for name in COMPARED}
    plain["modes"] = {mode: _kind(outcome) for mode, outcome in row.modes.items()}
    plain["static"] = None if row.static is None else _kind(row.static)
    plain["refused"] = None if row.refused is None else _kind(row.refused)
    return plain


def differences(expected: dict[str, Row], found: dict[str, Row]) -> list[str]:
    """One line for each field of a found row that is not as expected, and for each row that nobody expected."""
    lines = []
    for name, row in found.items():
        if name not in expected:
            lines.append(f"{name}: no expectation; found {row.record()}")
            continue
        before, now = _comparable(expected[name]), _comparable(row)
        lines += [f"{name}: {part} was {before[part]}, is {now[part]}" for part in now if now[part] != before[part]]
        lines += [f"{name}: {mode}: {text}" for mode, text in row.modes.items() if before != now and text != "equal"]
    return lines
