"""Versions satisfy what siblings ask of them, and the declared floors are the ones that are tested."""

from __future__ import annotations

import re
from importlib.metadata import requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

PACKAGES = ("turboquant-core", "turboquant-triton", "turboquant-hf", "turboquant-vllm")


def sibling_requirements() -> list[tuple[str, Requirement]]:
    found = []
    for package in PACKAGES:
        asked = [Requirement(text) for text in requires(package) or []]
        found += [(package, requirement) for requirement in asked if requirement.name in PACKAGES]
    return found


@pytest.mark.parametrize(("package", "requirement"), sibling_requirements(), ids=lambda value: str(value))
def test_a_sibling_fits(package: str, requirement: Requirement) -> None:
    have = version(requirement.name)
    assert requirement.specifier.contains(have, prereleases=True), f"{package} asks for {requirement}, have {have}"


def test_every_consumer_asks_for_core() -> None:
    consumers = {package for package, requirement in sibling_requirements() if requirement.name == "turboquant-core"}
    assert consumers == set(PACKAGES) - {"turboquant-core"}


def test_the_minimums_are_those_that_core_declares() -> None:
    text = (Path(__file__).parents[1] / "constraints-minimums.txt").read_text()
    tested = dict(re.findall(r"^([\w-]+)==(\S+)$", text, flags=re.MULTILINE))
    asked = [Requirement(text) for text in requires("turboquant-core") or []]
    # Triton's floor is turboquant-triton's, tested in a session of its own.
    assert {requirement.name for requirement in asked} == set(tested) - {"triton"}
    for requirement in asked:
        (floor,) = (part.version for part in requirement.specifier if part.operator == ">=")
        if requirement.name != "torch":  # its floor runs where that release is at hand
            assert tested[requirement.name].startswith(floor), f"{requirement} is tested at {tested[requirement.name]}"
