"""What the serving benchmark reads out of an engine's log."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))


def test_kernels_compiled_while_serving_fail_a_packed_engine() -> None:
    import serving

    warning = "(EngineCore pid=7) WARNING [jit_monitor.py:135] Triton kernel JIT compilation during inference: "
    log = (
        f"init engine took 51.99 s\n{warning}gather_kernel. This\n{warning}attend_kernel. This\n{warning}gather_kernel."
    )
    named = serving.compiled_while_serving(log)
    assert named == ["attend_kernel", "gather_kernel"]
    assert serving.compiled_while_serving("init engine took 51.99 s") == []
    assert serving.failed({"turboquant-4bit": {"compiled_while_serving": named}})
    assert not serving.failed({"bf16": {"compiled_while_serving": named}, "turboquant-4bit": {}})
