"""Nothing that git keeps names a home folder, a private address or a private registry."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PRIVATE = re.compile(
    r"(?<![\w.])/(?:home|Users|root)/[\w.-]+"
    r"|\b(?:10|192\.168|172\.(?:1[6-9]|2\d|3[01]))(?:\.\d{1,3}){2,3}\b"
    r"|https?://[^\s\"'<>)]*(?:/simple\b|artifactory|nexus|devpi)",
)


def committed_texts() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    return [path for path in paths if path.is_file() and path != Path(__file__)]


def test_no_private_place_is_named() -> None:
    leaks = []
    for path in committed_texts():
        data = path.read_bytes()
        if b"\0" in data:
            continue
        text = data.decode(errors="replace")
        leaks += [f"{path.relative_to(ROOT)}: {found.group()}" for found in PRIVATE.finditer(text)]
    assert not leaks
