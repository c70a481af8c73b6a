"""Which provider is chosen, and what is said when none can be."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch

from turboquant_core import (
    KernelRequest,
    PageLayout,
    ProviderError,
    ReferenceProvider,
    VectorLayout,
    available_providers,
    load_provider,
    select_provider,
    selection,
)

LAYOUT = PageLayout(VectorLayout(64, 4, "int8"), VectorLayout(64, 4, "cubic"), page_size=16, kv_heads=1)
REQUEST = KernelRequest(LAYOUT, torch.device("cpu"), torch.float32)


class Fast(ReferenceProvider):
    name: ClassVar[str] = "fast"
    priority: ClassVar[int] = 50


class Picky(ReferenceProvider):
    name: ClassVar[str] = "picky"
    priority: ClassVar[int] = 90

    def unsupported_reason(self, request: KernelRequest) -> str | None:
        return "the moon is full"


class Broken(ReferenceProvider):
    def __init__(self) -> None:
        raise OSError("no driver")


class Entry:
    """What selection uses of an entry point."""

    def __init__(self, name: str, value: Any) -> None:
        self.name, self.value, self._target = name, f"somewhere:{name}", value

    def load(self) -> Any:
        return self._target


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TURBOQUANT_PROVIDER", raising=False)


def install(monkeypatch: pytest.MonkeyPatch, **providers: Any) -> None:
    entries = [Entry(name, value) for name, value in providers.items()]
    monkeypatch.setattr(selection, "entry_points", lambda group: entries)


def test_the_reference_is_registered() -> None:
    assert "reference" in available_providers()
    assert load_provider("reference").name == "reference"


def test_highest_priority_that_supports_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, reference=ReferenceProvider, fast=Fast, picky=Picky, broken=Broken)
    assert select_provider(REQUEST).name == "fast"
    install(monkeypatch, reference=ReferenceProvider, picky=Picky)
    assert select_provider(REQUEST).name == "reference"


def test_a_named_provider_works_or_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, reference=ReferenceProvider, fast=Fast, picky=Picky, broken=Broken)
    assert select_provider(REQUEST, "reference").name == "reference"
    with pytest.raises(ProviderError, match="the moon is full"):
        select_provider(REQUEST, "picky")
    with pytest.raises(ProviderError, match="no driver"):
        select_provider(REQUEST, "broken")
    with pytest.raises(ProviderError, match="'absent' is not installed; installed: broken, fast, picky, reference"):
        select_provider(REQUEST, "absent")


def test_the_environment_names_a_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, reference=ReferenceProvider, fast=Fast, picky=Picky)
    monkeypatch.setenv("TURBOQUANT_PROVIDER", "reference")
    assert select_provider(REQUEST).name == "reference"
    assert select_provider(REQUEST, "fast").name == "fast"
    monkeypatch.setenv("TURBOQUANT_PROVIDER", "picky")
    with pytest.raises(ProviderError, match="the moon is full"):
        select_provider(REQUEST)


def test_none_fits_and_each_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, reference=ReferenceProvider, picky=Picky, broken=Broken)
    with pytest.raises(ProviderError) as caught:
        select_provider(REQUEST, allow_reference=False)
    text = str(caught.value)
    for part in ("picky: the moon is full", "no driver", "reference: not accepted"):
        assert part in text


def test_objects_that_are_no_provider_and_names_taken_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, odd=dict)
    with pytest.raises(ProviderError, match="no KernelProvider"):
        load_provider("odd")
    twice = [Entry("fast", Fast), Entry("fast", Fast)]
    twice[1].value = "elsewhere:Fast"
    monkeypatch.setattr(selection, "entry_points", lambda group: twice)
    with pytest.raises(ProviderError, match="two kernel providers are named 'fast'"):
        available_providers()
