"""The registered function: unknown arguments, missing masks, dtypes; right in every case, and counted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from turboquant_core import (
    CacheCodec,
    PackedSequences,
    PageLayout,
    RawLayout,
    ReferenceProvider,
    VectorLayout,
    WindowedSequences,
    Windows,
)
from turboquant_hf.attention import turboquant_attention
from turboquant_hf.compat import sdpa_attention_forward
from turboquant_hf.counters import LayerCounters
from turboquant_hf.handle import PackedTensor, StepPast

LENGTH = 20
MODULE: Any = SimpleNamespace(training=False, is_causal=True, num_key_value_groups=2)


def past(value: VectorLayout | RawLayout, dtype: torch.dtype = torch.float32) -> StepPast:
    layout = PageLayout(VectorLayout(32, 4, "int8"), value, page_size=16, kv_heads=2)
    store = PackedSequences(2, CacheCodec.create(layout), ReferenceProvider(), dtype)
    both = torch.randn(2, 2, 2, LENGTH, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    store.append(*both)
    return StepPast(WindowedSequences(store, Windows()).past(), dtype, LayerCounters())


@pytest.fixture
def step() -> StepPast:
    return past(VectorLayout(32, 4, "cubic"))


def attend(step: StepPast, query: torch.Tensor, mask: torch.Tensor | None = None, **arguments: Any) -> torch.Tensor:
    """Output ``[batch, q_heads, q_len, head_dim]``."""
    keys, values = PackedTensor(step, "keys"), PackedTensor(step, "values")
    return turboquant_attention(MODULE, query, keys, values, mask, **arguments)[0].transpose(1, 2)


def expected(
    step: StepPast, query: torch.Tensor, visible: torch.Tensor | None = None, scale: float | None = None
) -> Any:
    keys, values = (x.float() for x in step.decoded)
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=visible, scale=scale, enable_gqa=True)


def queries(q_len: int) -> torch.Tensor:
    return torch.randn(2, 4, q_len, 32, generator=torch.Generator().manual_seed(1))


def bottom_right(q_len: int) -> torch.Tensor:
    return torch.arange(LENGTH) <= torch.arange(LENGTH - q_len, LENGTH).view(-1, 1)


@pytest.mark.parametrize(("q_len", "path"), [(1, "fused"), (3, "fused"), (16, "fused"), (17, "decoded")])
def test_a_missing_mask_is_aligned_to_the_last_key(step: StepPast, q_len: int, path: str) -> None:
    query = queries(q_len)
    torch.testing.assert_close(attend(step, query), expected(step, query, bottom_right(q_len)), rtol=1e-5, atol=1e-5)
    assert step.counters.path == path


@pytest.mark.parametrize("q_len", [3, 17])
def test_is_causal_false_sees_everything(step: StepPast, q_len: int) -> None:
    query = queries(q_len)
    got = attend(step, query, is_causal=False)
    torch.testing.assert_close(got, expected(step, query), rtol=1e-5, atol=1e-5)


def test_scaling_comes_from_the_call(step: StepPast) -> None:
    query = queries(1)
    got = attend(step, query, scaling=0.7)
    torch.testing.assert_close(got, expected(step, query, scale=0.7), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "path"),
    [
        ({"output_router_logits": True, "use_cache": True, "position_ids": torch.zeros(1)}, "fused"),
        ({"indices": None, "output_attentions": False}, "fused"),
        ({"indices": torch.zeros(1)}, "decoded"),
        ({"block_indices": "a name"}, "decoded"),
        ({"sliding_window": 64}, "fused"),
        ({"sliding_window": 8}, "decoded"),
    ],
    ids=str,
)
def test_arguments(step: StepPast, arguments: dict[str, Any], path: str) -> None:
    query = queries(1)
    got = attend(step, query, **arguments)
    torch.testing.assert_close(got, expected(step, query), rtol=1e-5, atol=1e-5)
    assert step.counters.path == path


@pytest.mark.parametrize("argument", [{"softcap": 0.5}, {"s_aux": torch.full((4,), 3.0)}], ids=["softcap", "s_aux"])
def test_what_sdpa_ignores_is_ignored(step: StepPast, argument: dict[str, Any]) -> None:
    """Gemma 2 passes its soft cap to sdpa too in older releases: the prompt and what follows must be one model."""
    query = queries(1)
    torch.testing.assert_close(attend(step, query, **argument), expected(step, query), rtol=1e-5, atol=1e-5)
    assert step.counters.path == "fused"


def test_a_position_bias_reaches_the_models_own_attention(step: StepPast) -> None:
    query = queries(1)
    bias = torch.randn(1, 4, 1, LENGTH, generator=torch.Generator().manual_seed(4))
    got = attend(step, query, position_bias=bias)
    # An older one ignores this argument, and so do we then.
    stock = sdpa_attention_forward(MODULE, query, *step.decoded, None, position_bias=bias)[0].transpose(1, 2)
    torch.testing.assert_close(got, stock)
    assert step.counters.reasons == {"argument position_bias of its attention, which packed attention does not have": 1}


def test_a_mask_changed_in_place_is_read_again(step: StepPast) -> None:
    query, mask = queries(1), torch.ones(2, 1, 1, LENGTH, dtype=torch.bool)
    attend(step, query, mask)
    mask[1, ..., :5] = False
    torch.testing.assert_close(attend(step, query, mask), expected(step, query, mask), rtol=1e-5, atol=1e-5)
    assert step.counters.path == "fused"


def test_a_mask_is_read_once_for_all_layers(step: StepPast, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    honest = torch.equal
    monkeypatch.setattr(torch, "equal", lambda *tensors: reads.append(1) or honest(*tensors))
    mask = torch.ones(2, 1, 1, LENGTH, dtype=torch.bool)
    for _ in range(5):
        attend(step, queries(1), mask)
    assert len(reads) == 1


def test_masks_that_differ_between_heads_are_one_reason(step: StepPast) -> None:
    mask = torch.rand(2, 4, 1, LENGTH)
    torch.testing.assert_close(attend(step, queries(1), mask), expected(step, queries(1), mask), rtol=1e-5, atol=1e-5)
    assert step.counters.reasons == {"mask that differs between heads": 1}


def test_raw_values_are_not_read_as_another_dtype() -> None:
    """fp16 and bf16 have the same size, so nothing else would notice."""
    step = past(RawLayout(32, 2), torch.bfloat16)
    with pytest.raises(RuntimeError, match="dtype"):
        attend(step, queries(1).half())
    assert "raw torch.bfloat16 values" in next(iter(step.counters.reasons))
    got = attend(past(RawLayout(32, 2), torch.bfloat16), queries(1).bfloat16())
    torch.testing.assert_close(got.float(), expected(step, queries(1)), rtol=3e-2, atol=3e-2)


def test_several_operations_of_a_step_count_once(step: StepPast) -> None:
    keys, values = PackedTensor(step, "keys"), PackedTensor(step, "values")
    scores = queries(1)[:, :2] @ (keys * 2).transpose(-1, -2)
    assert type(scores.softmax(-1) @ values) is torch.Tensor
    assert step.counters.paths["decoded"] == 1
    assert keys.view(2, 2, -1).shape == (2, 2, LENGTH * 32)
