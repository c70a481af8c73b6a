"""Each package's version satisfies what its siblings ask of it."""

from __future__ import annotations

from importlib.metadata import requires, version

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
