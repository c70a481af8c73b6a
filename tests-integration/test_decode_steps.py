"""Steps that the Transformers benchmark counts: warmed up, and without one in which a kernel was compiled."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import decode_steps
from decode_steps import LEAST_TIMED, LEAST_WARM_UP, WARM_UP, Take, decode, room


def steps_of(seconds: Iterator[float]) -> Take:
    return lambda: next(seconds)


def constantly(seconds: float) -> Iterator[float]:
    while True:
        yield seconds


def compiling(name: str) -> None:
    """What Triton does after it compiled a kernel."""
    hook = pytest.importorskip("triton").knobs.runtime.jit_post_compile_hook
    if hook is not None:
        info = pytest.importorskip("triton.runtime.jit").JitFunctionInfo("module", name, None)
        hook(key="", repr="", fn=info, compile={}, is_manual_warmup=False, already_compiled=False)


def at_steps(*numbers: int) -> Take:
    """Steps of 0.01 s, of 0.3 s where a kernel is compiled: those with ``numbers``, from 0 on."""
    count = -1

    def take() -> float:
        nonlocal count
        count += 1
        if count not in numbers:
            return 0.01
        compiling(f"kernel {count}")
        return 0.3

    return take


def test_untimed_steps_come_first() -> None:
    found = decode(steps_of(iter([*[5.0] * 2, *[1e-3] * (WARM_UP - 2), 0.1, 0.3, 0.2])), 3)
    assert found.timed == [0.1, 0.3, 0.2]
    row = found.row(4)
    assert row["tokens_per_second"] == 4 / 0.2
    assert (row["first_step_seconds"], row["fastest_step_seconds"], row["slowest_step_seconds"]) == (5.0, 0.1, 0.3)
    assert (row["untimed_steps"], row["timed_steps"], row["median_step_seconds"]) == (WARM_UP, 3, 0.2)
    assert row["compiled_later"] == []


def test_slow_steps_are_few() -> None:
    found = decode(steps_of(constantly(30.0)), 32)
    assert (len(found.untimed), len(found.timed)) == (LEAST_WARM_UP + 1, LEAST_TIMED)


def test_a_step_that_compiles_does_not_count() -> None:
    # Kernels of the warm-up are nobody's business.
    found = decode(at_steps(0, 7, WARM_UP, WARM_UP + 2), 4)
    assert found.timed == [0.01] * 4
    assert found.compiled == [f"kernel {WARM_UP}", f"kernel {WARM_UP + 2}"]
    assert found.row(1)["compiled_later"] == found.compiled


def test_steps_that_all_compile_have_no_figures_and_no_end_beyond_the_room() -> None:
    taken = 0
    one = at_steps(*range(1000))

    def take() -> float:
        nonlocal taken
        taken += 1
        return one()

    with pytest.raises(RuntimeError, match=r"compiled in 4 steps after the warm-up: \['kernel 20'"):
        decode(take, 4)
    assert taken <= room(4)


def test_the_hook_of_triton_is_given_back() -> None:
    runtime = pytest.importorskip("triton").knobs.runtime
    before = runtime.jit_post_compile_hook
    with decode_steps.compilations():
        assert runtime.jit_post_compile_hook is not before
    assert runtime.jit_post_compile_hook is before


def test_nothing_is_compiled_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str, *_: Any) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(decode_steps.importlib, "import_module", absent)
    assert decode(steps_of(constantly(0.5)), 2).timed == [0.5, 0.5]
