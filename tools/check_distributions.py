"""Check the names and contents of the wheels and source distributions in a folder."""

from __future__ import annotations

import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

PACKAGES = ("core", "triton", "hf", "vllm")
ROOT = Path(__file__).parents[1]
NOT_SHIPPED = {".pyc", ".pyo"}


def source_files(package: str) -> set[str]:
    """Every file of a package's source, data files included, relative to ``src/``."""
    source = ROOT / "packages" / f"turboquant-{package}" / "src"
    files = (path for path in source.rglob("*") if path.is_file() and path.suffix not in NOT_SHIPPED)
    return {path.relative_to(source).as_posix() for path in files}


def check_wheel(path: Path, package: str) -> list[str]:
    """Complaints about a wheel: files that are missing, files that do not belong, a licence that is not stated."""
    module = f"turboquant_{package}"
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        fields = Parser().parsestr(archive.read(metadata).decode())
    info = metadata.removesuffix("/METADATA")
    needed = source_files(package) | {f"{module}/py.typed", f"{info}/licenses/LICENSE"}
    complaints = [f"{name} is missing" for name in sorted(needed - names)]
    foreign = [name for name in names if not name.startswith((f"{module}/", f"{info}/"))]
    complaints += [f"{name} does not belong here" for name in sorted(foreign)]
    if fields["License-Expression"] != "Apache-2.0":
        complaints.append(f"License-Expression is {fields['License-Expression']}")
    if fields["Name"] != f"turboquant-{package}":
        complaints.append(f"Name is {fields['Name']}")
    return complaints


def check_sdist(path: Path, package: str) -> list[str]:
    """Complaints about a source distribution: files that are missing, or anything outside the allow-list."""
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", "PKG-INFO"}
    needed |= {f"src/{name}" for name in source_files(package)}
    complaints = [f"{name} is missing" for name in sorted(needed - names)]
    allowed = ("LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", "PKG-INFO", ".gitignore", "src/", "tests/")
    return complaints + [f"{name} does not belong here" for name in sorted(names) if not name.startswith(allowed)]


def check(folder: Path) -> list[str]:
    """Complaints about all distributions of the repository in ``folder``."""
    complaints, expected = [], set()
    for package in PACKAGES:
        for pattern, examine in (("-*.whl", check_wheel), ("-*.tar.gz", check_sdist)):
            found = list(folder.glob(f"turboquant_{package}{pattern}"))
            expected.update(found)
            if len(found) != 1:
                complaints.append(f"turboquant_{package}{pattern}: found {len(found)}, expected 1")
            complaints += [f"{path.name}: {text}" for path in found for text in examine(path, package)]
    strangers = sorted(path.name for path in set(folder.iterdir()) - expected)
    return complaints + [f"{name}: not a distribution of ours" for name in strangers]


if __name__ == "__main__":
    found = check(Path(sys.argv[1]))
    print("\n".join(found) or f"{sys.argv[1]}: names and contents are as they should be")
    sys.exit(bool(found))
