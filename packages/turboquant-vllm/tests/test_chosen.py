"""Who gives options without choosing the backend is told, once."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from turboquant_vllm import chosen
from turboquant_vllm.registration import BACKEND_NAME, BACKEND_PATH

OPTIONS = {"turboquant": {"bits": 2}}


def member(name: str, path: str | None = None) -> Any:
    return SimpleNamespace(name=name, is_overridden=lambda: path is not None, get_path=lambda: path)


def engine(backend: Any = None, additional: Any = None, cache_dtype: str = "auto", **per_kind: Any) -> Any:
    return SimpleNamespace(
        attention_config=SimpleNamespace(backend=backend, backend_per_kind=per_kind),
        cache_config=SimpleNamespace(cache_dtype=cache_dtype),
        additional_config=additional or {},
    )


@pytest.mark.parametrize(
    ("config", "ours"),
    [
        (engine(), False),
        (engine(member("FLASH_ATTN")), False),
        (engine(member(BACKEND_NAME)), True),
        (engine(full_attention=member(BACKEND_NAME)), True),
        (engine(member("CUSTOM", BACKEND_PATH)), True),
        (engine(member("CUSTOM", "somebody.Backend")), False),
        (engine(member("CUSTOM")), False),
    ],
)
def test_who_has_chosen(config: Any, ours: bool) -> None:
    assert chosen.chosen(config) is ours


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """What the plug-in logs in a process that has logged nothing yet; vLLM's own logger passes nothing on."""
    monkeypatch.setattr(chosen, "_told", [])
    monkeypatch.setattr(chosen, "logger", logging.getLogger("told"))
    for name in ("TURBOQUANT_BITS", "TURBOQUANT_COMPRESS_V"):
        monkeypatch.delenv(name, raising=False)
    return caplog


def test_unused_options_are_told_once(told: pytest.LogCaptureFixture) -> None:
    chosen.tell_unused(engine())
    chosen.tell_unused(engine(member("FLASH_ATTN"), OPTIONS))
    chosen.tell_unused(engine(additional=OPTIONS))
    (message,) = told.messages
    assert message == (
        "additional_config['turboquant'] is given, but nothing is packed: choose the backend, "
        "--attention-backend FUSED_TURBOQUANT"
    )


def test_an_unused_variable_is_told(told: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TURBOQUANT_BITS", "3")
    chosen.tell_unused(engine())
    assert told.messages[0].startswith("TURBOQUANT_BITS is given, but nothing is packed")


def test_used_options_are_not(told: pytest.LogCaptureFixture) -> None:
    chosen.tell_unused(engine(member(BACKEND_NAME), OPTIONS))
    chosen.tell_unused(engine(additional=OPTIONS, cache_dtype="turboquant_4bit_nc"))
    assert not told.messages
