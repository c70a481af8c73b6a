"""Verification catches wrong wiring, and leaves the model as it was."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from turboquant_core import PackedPast, TurboQuantError
from turboquant_hf import QualityWarning, TurboQuantCache, patch_model, unpatch_model, verify_model
from turboquant_hf import fused as fused_module

from .conftest import CONFIGS, TINY, build


def test_every_family_passes(model: Any) -> None:
    result = verify_model(model, lambda: TurboQuantCache(model.config, 3))
    assert 0 <= result.error <= result.tolerance


@pytest.mark.parametrize("dropped", ["seq_starts", "scaling"])
def test_a_dropped_argument_is_caught(llama: Any, monkeypatch: pytest.MonkeyPatch, dropped: str) -> None:
    honest = PackedPast.attend

    def broken(self: PackedPast, query: torch.Tensor, **options: Any) -> Any:
        options[dropped] = {"seq_starts": None, "scaling": 2 * options["scaling"]}[dropped]
        return honest(self, query, **options)

    monkeypatch.setattr(PackedPast, "attend", broken)
    with pytest.raises(TurboQuantError, match="relative error"):
        patch_model(llama)
    assert llama.config._attn_implementation == "sdpa"
    patch_model(llama, verify=False)
    assert llama.config._attn_implementation == "turboquant"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 2])
def test_half_precision(dtype: torch.dtype, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding passes for a trained model, and scores that are twice what they should be do not."""
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=dtype, local_files_only=True).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QualityWarning)
        patch_model(model, bits)
    unpatch_model(model)
    honest = PackedPast.attend

    def broken(self: PackedPast, query: torch.Tensor, *, scaling: float, **options: Any) -> Any:
        return honest(self, query, scaling=2 * scaling, **options)

    monkeypatch.setattr(PackedPast, "attend", broken)
    with pytest.raises(TurboQuantError, match="relative error"):
        patch_model(model, bits)


def test_a_dropped_softcap_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    gemma = build(*CONFIGS["gemma2"])
    gemma.config.attn_logit_softcapping = 0.5
    for layer in gemma.model.layers:
        layer.self_attn.attn_logit_softcapping = 0.5
    verify_model(gemma, lambda: TurboQuantCache(gemma.config))
    honest = fused_module.fused_attention

    def broken(*args: Any, **options: Any) -> Any:
        return honest(*args, **{**options, "softcap": None})

    monkeypatch.setattr("turboquant_hf.attention.fused_attention", broken)
    with pytest.raises(TurboQuantError):
        patch_model(gemma)
