"""What the serving benchmarks read out of an engine's log, and out of what engines answer."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

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


def test_a_preflight_whose_drafts_change_the_text_fails_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import serving_preflight

    def texts(token: int) -> list[dict[str, Any]]:
        return [{"tokens": [token], "logprobs": [{"7": -0.5, "9": -2.0}]}]

    answers = {"eager": [texts(7)] * 2, "speculative": [texts(9)] * 2}
    monkeypatch.setattr(serving_preflight, "ask", lambda name, *_: answers[name])
    monkeypatch.setattr(serving_preflight, "interruptible", lambda: None)
    monkeypatch.setattr(sys, "argv", ["preflight", "--out", str(tmp_path), "--only", "eager", "speculative"])
    with pytest.raises(SystemExit) as ended:
        serving_preflight.main()
    assert ended.value.code == 1
    assert "speculative: failed" in capsys.readouterr().out
    told = json.loads((tmp_path / "preflight.json").read_text())["results"]["speculative"]["told"]
    assert "0 of 1 texts as eager's (they part where the expected token led by 1.50 nats at most), no tie" in told


def test_the_text_of_transformers_is_held_to_the_engine_with_the_same_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import serving_preflight
    from serving_transformers import transformers_texts

    prompts, tokens, top = [[5, 6, 7], [9, 8, 7, 6]], 4, 3
    own = transformers_texts(serving_preflight.MODEL, prompts, tokens, top, serving_preflight.BITS)
    assert [len(text["tokens"]) for text in own] == [tokens, tokens]
    for text in own:
        for token, step in zip(text["tokens"], text["logprobs"], strict=True):
            assert len(step) == top
            assert max(step, key=step.__getitem__) == token
    own = json.loads(json.dumps(own))
    other = [{**text, "tokens": [1] * tokens} for text in own]
    rounds = {"raw-prompts": [own, own], "transformers": [own, own]}
    monkeypatch.setattr(serving_preflight, "ask", lambda name, *_: rounds[name])
    assert serving_preflight.check_all(["raw-prompts", "transformers"], tmp_path, tmp_path, 1.0)
    told = json.loads((tmp_path / "preflight.json").read_text())["results"]["transformers"]["told"]
    assert told.endswith("2 of 2 texts as raw-prompts's")
    rounds["transformers"] = [other, other]
    assert not serving_preflight.check_all(["raw-prompts", "transformers"], tmp_path, tmp_path, 1.0)
