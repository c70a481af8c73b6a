"""Providers are found by entry point, chosen by priority or by name, and explained when they cannot be had."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch

from turboquant_core import (
    KernelRequest,
    PageLayout,
    ProviderError,
    VectorLayout,
    available_providers,
    select_provider,
)

GROUP = "turboquant.kernel_providers"


def request_for(version: int = 1) -> KernelRequest:
    key, value = VectorLayout(64, 4, "int8", version), VectorLayout(64, 4, "cubic", version)
    return KernelRequest(PageLayout(key, value, page_size=16, kv_heads=2), torch.device("cpu"), torch.float32)


@pytest.fixture(autouse=True)
def _no_override(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TURBOQUANT_PROVIDER", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture
def broken_plug_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A distribution whose provider cannot be imported."""
    info = tmp_path / "broken_provider-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-provider\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\nbroken = broken_provider:Provider\n")
    (tmp_path / "broken_provider.py").write_text('raise ImportError("libbroken.so: no such file")\n')
    monkeypatch.syspath_prepend(tmp_path)
    return "broken"


def test_every_installed_provider_is_found() -> None:
    found = available_providers()
    assert {"reference", "triton", "example"} <= set(found)
    assert all(isinstance(entry, EntryPoint) for entry in found.values())


def test_the_highest_priority_that_fits_wins() -> None:
    assert select_provider(request_for()).name == "example"


def test_a_third_party_serves_where_the_reference_is_not_accepted() -> None:
    assert select_provider(request_for(), allow_reference=False).name == "example"


@pytest.mark.parametrize("name", ["reference", "example"])
def test_the_environment_variable_decides(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TURBOQUANT_PROVIDER", name)
    assert select_provider(request_for()).name == name


def test_an_argument_outranks_the_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TURBOQUANT_PROVIDER", "example")
    assert select_provider(request_for(), "reference").name == "reference"


def test_a_named_provider_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TURBOQUANT_PROVIDER", "no-such-provider")
    with pytest.raises(ProviderError, match=r"'no-such-provider' is not installed; installed: example, reference"):
        select_provider(request_for())


def test_a_named_provider_that_does_not_fit_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TURBOQUANT_PROVIDER", "triton")
    with pytest.raises(ProviderError, match=r"'triton' does not support .*: .*(cpu|CUDA|cuda)"):
        select_provider(request_for())


def test_a_broken_plug_in_disturbs_nobody(broken_plug_in: str) -> None:
    assert broken_plug_in in available_providers()
    assert select_provider(request_for()).name == "example"


def test_a_broken_plug_in_is_explained_when_asked_for(broken_plug_in: str) -> None:
    with pytest.raises(ProviderError, match=r"'broken' failed to load: .*libbroken.so: no such file"):
        select_provider(request_for(), broken_plug_in)


def test_when_nothing_fits_every_provider_gives_its_reason(broken_plug_in: str) -> None:
    with pytest.raises(ProviderError) as caught:
        select_provider(request_for(version=999))
    for name in ("reference", "triton", "example", broken_plug_in):
        assert f"\n  {name}: " in str(caught.value)
    assert "layout version 999" in str(caught.value)
