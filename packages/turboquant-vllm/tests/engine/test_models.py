"""Every kind of attention that is served: capacity, the first token as without packing, no trace of scheduling.

A prompt that is computed at once attends to its own keys and values as they came, so that its first token must be that
of vLLM's own attention: a window, a soft-cap or a sink that was left out would show there.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from turboquant_vllm.compat import backend_sizes_pages

from .conftest import Engines, disagreement, drift
from .models import IDS, RANDOM, model

PACKED = {"prefill": "packed"}
EXACT = 1e-4
"""Nats by which float32 sums in another order differ."""
CUT = {**RANDOM, "max_num_batched_tokens": 48, "enable_prefix_caching": True}
# head_dim 32: two times 32 floats of 4 bytes, or two times 16 bytes of codes and 2 of scale.
GAIN = 256 / 36


@pytest.mark.parametrize("kind", ["soft caps and windows", "state space"])
def test_older_releases_refuse(engines: Engines, tmp_path: Path, kind: str) -> None:
    if backend_sizes_pages():
        pytest.skip("this vLLM lets a backend size its pages")
    refusal = engines.refusal({}, model=model(tmp_path, kind), **RANDOM)
    assert "sliding window not supported" in refusal or "can be packed from vLLM 0.28 on" in refusal


@pytest.mark.usefixtures("sized_pages")
@pytest.mark.parametrize(
    "kind", ["soft caps and windows", "sinks and windows", pytest.param("plain", marks=pytest.mark.slow)]
)
def test_the_first_token_is_that_of_raw_attention(engines: Engines, tmp_path: Path, kind: str) -> None:
    small = model(tmp_path, kind)
    full = engines.unless_vllm_fails([IDS], model=small, **RANDOM)
    raw = engines([IDS], {}, model=small, **RANDOM)
    assert raw.blocks / full.blocks == pytest.approx(GAIN, rel=0.02)
    assert drift(full.passes[0], raw.passes[0]) < EXACT
    packed = engines([IDS], PACKED, model=small, **RANDOM)
    assert EXACT < drift(full.passes[0], packed.passes[0]) < 0.5
    assert engines([IDS, IDS], PACKED, model=small, **CUT).tokens(1) == packed.tokens()


@pytest.mark.usefixtures("sized_pages")
def test_layers_that_share_pages_read_them(engines: Engines, tmp_path: Path) -> None:
    shared = model(tmp_path, "shared pages")
    full = engines([IDS], model=shared, **RANDOM)
    packed = engines([IDS], PACKED, model=shared, **RANDOM)
    assert packed.blocks / full.blocks == pytest.approx(GAIN, rel=0.02)
    assert drift(full.passes[0], engines([IDS], {}, model=shared, **RANDOM).passes[0]) < 0.2
    assert drift(full.passes[0], packed.passes[0]) < 0.4
    # vLLM's own attention gives other logits too when this model's prompts are cut, in some releases only when cached.
    allowed = 4 * max(drift(full.passes[0], own) for own in engines([IDS, IDS], model=shared, **CUT).passes)
    cut = engines([IDS, IDS], PACKED, model=shared, **CUT)
    assert drift(packed.passes[0], cut.passes[0]) < allowed
    assert drift(packed.passes[0], cut.passes[1]) < allowed


@pytest.mark.usefixtures("sized_pages")
def test_layers_beside_a_state_space(engines: Engines, tmp_path: Path) -> None:
    hybrid = model(tmp_path, "state space")
    full = engines.unless_vllm_fails([IDS], model=hybrid, **RANDOM)
    raw = engines([IDS], {}, model=hybrid, **RANDOM)
    assert raw.blocks * raw.block_size / (full.blocks * full.block_size) == pytest.approx(GAIN, rel=0.02)
    assert drift(full.passes[0], raw.passes[0]) < EXACT
    cut = engines([IDS], PACKED, model=hybrid, **{**RANDOM, "max_num_batched_tokens": 64})
    assert disagreement(engines([IDS], PACKED, model=hybrid, **RANDOM).passes[0], cut.passes[0]) < 0.2


@pytest.mark.usefixtures("sized_pages")
@pytest.mark.parametrize("kind", ["sinks and windows", pytest.param("shared pages", marks=pytest.mark.slow)])
def test_unequal_layers_that_share_blocks_are_refused(engines: Engines, tmp_path: Path, kind: str) -> None:
    refusal = engines.refusal({"layers": {"1": {"k_bits": 3}}}, model=model(tmp_path, kind), **RANDOM)
    assert "full_attention, sliding_attention), which share blocks" in refusal
    assert "keys 4 bits, values 4 bits; keys 3 bits, values 3 bits. Give all layers equal bits" in refusal


@pytest.mark.slow
@pytest.mark.usefixtures("sized_pages")
def test_unequal_layers_beside_a_state_space_are_refused(engines: Engines, tmp_path: Path) -> None:
    refusal = engines.refusal({"layers": {"1": {"k_bits": 3}}}, model=model(tmp_path, "state space"), **RANDOM)
    assert "which share blocks" in refusal


@pytest.mark.usefixtures("sized_pages")
def test_two_head_sizes_are_refused(engines: Engines, tmp_path: Path) -> None:
    gemma = model(tmp_path, "two head sizes")
    engines.unless_vllm_fails([IDS], model=gemma, **RANDOM)
    refusal = engines.refusal({}, model=gemma, **RANDOM)
    assert "layers.0.self_attn.attn (head_dim 32, 2 KV heads) and" in refusal
    assert "layers.1.self_attn.attn (head_dim 64, 2 KV heads) have pages of which the larger is no multiple" in refusal


@pytest.mark.slow
@pytest.mark.usefixtures("sized_pages")
def test_layers_of_twice_the_heads_share_blocks(engines: Engines, tmp_path: Path) -> None:
    halves = {"global_head_dim": 32, "num_global_key_value_heads": 1, "attention_k_eq_v": True}
    small = model(tmp_path, "two head sizes", **halves)
    full = engines.unless_vllm_fails([IDS], model=small, **RANDOM)
    assert drift(full.passes[0], engines([IDS], {}, model=small, **RANDOM).passes[0]) < EXACT
    packed = engines([IDS], PACKED, model=small, **RANDOM)
    assert engines([IDS, IDS], PACKED, model=small, **CUT).tokens(1) == packed.tokens()
