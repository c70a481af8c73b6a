"""A handle looks dense, decodes for any operation, and says so."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from transformers.integrations.sdpa_attention import repeat_kv

from turboquant_core import (
    CacheCodec,
    PackedSequences,
    PageLayout,
    ReferenceProvider,
    VectorLayout,
    WindowedSequences,
    Windows,
)
from turboquant_hf.counters import LayerCounters
from turboquant_hf.handle import PackedTensor, StepPast
from turboquant_hf.reasons import LATENT


@pytest.fixture
def step() -> StepPast:
    layout = PageLayout(VectorLayout(32, 4, "int8"), VectorLayout(64, 4, "cubic"), page_size=16, kv_heads=2)
    store = PackedSequences(3, CacheCodec.create(layout), ReferenceProvider(), torch.float32)
    generator = torch.Generator().manual_seed(0)
    store.append(torch.randn(3, 2, 20, 32, generator=generator), torch.randn(3, 2, 20, 64, generator=generator))
    return StepPast(WindowedSequences(store, Windows()).past(), torch.float32, LayerCounters())


def test_shape_and_dtype_without_decoding(step: StepPast) -> None:
    keys, values = PackedTensor(step, "keys"), PackedTensor(step, "values")
    assert keys.shape == (3, 2, 20, 32)
    assert values.shape == (3, 2, 20, 64)
    assert keys.dtype == torch.float32
    assert keys.numel() == 3 * 2 * 20 * 32
    assert step.counters.path == "unused"
    assert "keys" in repr(keys)


def test_any_operation_decodes_and_counts(step: StepPast) -> None:
    keys = PackedTensor(step, "keys")
    result = (keys * 2)[:, 0].sum(-1)
    assert type(result) is torch.Tensor
    torch.testing.assert_close(result, (step.decoded.keys * 2)[:, 0].sum(-1))
    assert step.counters.paths["decoded"] == 1
    assert "mul" in next(iter(step.counters.reasons))


@pytest.mark.parametrize("gqa", [True, False])
def test_intercepted_attention(step: StepPast, gqa: bool) -> None:
    query = torch.randn(3, 4 if gqa else 2, 1, 32, generator=torch.Generator().manual_seed(1))
    keys, values = PackedTensor(step, "keys"), PackedTensor(step, "values")
    got = F.scaled_dot_product_attention(query, keys, values, enable_gqa=gqa, scale=0.3)
    expected = F.scaled_dot_product_attention(query, keys.dense(), values.dense(), enable_gqa=gqa, scale=0.3)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert step.counters.path == "intercepted"


def test_query_heads_folded_into_the_token_axis(step: StepPast) -> None:
    """Transformers packs grouped heads as if they were tokens: without a mask, each of them sees every key."""
    query = torch.randn(3, 2, 5, 32, generator=torch.Generator().manual_seed(1))
    keys, values = PackedTensor(step, "keys"), PackedTensor(step, "values")
    got = F.scaled_dot_product_attention(query, keys, values)
    torch.testing.assert_close(
        got, F.scaled_dot_product_attention(query, keys.dense(), values.dense()), rtol=1e-5, atol=1e-5
    )
    assert step.counters.path == "intercepted"


@pytest.mark.parametrize(
    ("mask", "path"),
    [
        ("padding", "intercepted"),
        ("causal", "intercepted"),
        ("additive", "intercepted"),
        ("hole", "decoded"),
        ("bias", "decoded"),
    ],
)
def test_masks(step: StepPast, mask: str, path: str) -> None:
    query = torch.randn(3, 2, 4, 32, generator=torch.Generator().manual_seed(1))
    visible = torch.ones(3, 1, 4, 20, dtype=torch.bool)
    visible[1, ..., :6] = False
    if mask == "causal":
        visible &= torch.arange(20) <= torch.arange(16, 20).view(-1, 1)
    if mask == "hole":
        visible[2, ..., 9] = False
    attn_mask = visible
    if mask == "additive":
        attn_mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    if mask == "bias":
        attn_mask = torch.rand(visible.shape, generator=torch.Generator().manual_seed(2))
    keys, values = PackedTensor(step, "keys"), PackedTensor(step, "values")
    got = F.scaled_dot_product_attention(query, keys, values, attn_mask=attn_mask)
    expected = F.scaled_dot_product_attention(query, keys.dense(), values.dense(), attn_mask=attn_mask)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert step.counters.path == path


def test_causal_flag_of_torch_is_aligned_to_the_first_key(step: StepPast) -> None:
    query = torch.randn(3, 2, 4, 32, generator=torch.Generator().manual_seed(1))
    keys, values = PackedTensor(step, "keys"), PackedTensor(step, "values")
    got = F.scaled_dot_product_attention(query, keys, values, is_causal=True)
    torch.testing.assert_close(got, F.scaled_dot_product_attention(query, keys.dense(), values.dense(), is_causal=True))
    assert step.counters.reasons == {"is_causal with a past": 1}


class TestRepeatedHeads:
    """``repeat_kv`` of a handle is a handle: packed attention needs no copies."""

    def test_nothing_is_decoded(self, step: StepPast) -> None:
        keys, values = (repeat_kv(PackedTensor(step, kind), 3) for kind in ("keys", "values"))
        assert keys.shape == (3, 6, 20, 32)
        query = torch.randn(3, 6, 2, 32, generator=torch.Generator().manual_seed(1))
        mask = torch.ones(2, 20, dtype=torch.bool).tril(18).view(1, 1, 2, 20)
        got = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
        assert step.counters.path == "intercepted"
        dense = (repeat_kv(x, 3) for x in step.decoded)
        expected = F.scaled_dot_product_attention(query, *dense, attn_mask=mask)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(keys.dense(), repeat_kv(step.decoded.keys, 3))
        assert torch.equal(keys + 0, repeat_kv(step.decoded.keys, 3))

    @pytest.mark.parametrize(
        "change",
        [
            lambda x: x[:, :, None, :, :] + 1,
            lambda x: x[:, :, None, :, :].sum(),
            lambda x: x[:, :, None, :, :].expand(3, 2, 4, 20, 32).flatten(1, 2),
            lambda x: x[:, :, None, :, :].expand(-1, -1, 4, -1, -1).reshape(3, 8, 20, 32),
            lambda x: x[:, :, None, :, :].reshape(3, 2, 640),
            lambda x: torch.exp(x[:, :, None, :, :]),
            lambda x: x[:, :, None, :, :].expand(3, 2, -1, 20, 32),
            lambda x: torch.cat([x[:, :, None, :, :], x[:, :, None, :, :]], dim=2),
            lambda x: torch.add(input=x[:, :, None, :, :], other=1),
            lambda x: x[:, :, None, :, :][:, 0],
        ],
    )
    def test_anything_else_decodes(self, step: StepPast, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        keys = PackedTensor(step, "keys")
        assert torch.equal(change(keys), change(step.decoded.keys))
        assert step.counters.path == "decoded"


class TestTiledHeads:
    """All heads round by round, where ``repeat_kv`` repeats each one: queries are put in the order of pages."""

    @pytest.mark.parametrize("per_head", [1, 2])
    @pytest.mark.parametrize("queries", [1, 3])
    def test_nothing_is_decoded(self, step: StepPast, per_head: int, queries: int) -> None:
        keys, values = (PackedTensor(step, kind).repeat(1, 3, 1, 1) for kind in ("keys", "values"))
        assert keys.shape == (3, 6, 20, 32)
        query = torch.randn(3, 6 * per_head, queries, 32, generator=torch.Generator().manual_seed(1))
        got = F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)
        assert step.counters.path == "intercepted"
        dense = (x.repeat(1, 3, 1, 1) for x in step.decoded)
        expected = F.scaled_dot_product_attention(query, *dense, enable_gqa=True)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)

    def test_tiles_of_tiles(self, step: StepPast) -> None:
        keys = PackedTensor(step, "keys").repeat(1, 2, 1, 1).repeat((1, 2, 1, 1))
        assert keys.shape[1] == 8
        assert step.counters.path == "unused"
        assert torch.equal(keys + 0, step.decoded.keys.repeat(1, 4, 1, 1))

    @pytest.mark.parametrize("sizes", [(2, 1, 1, 1), (1, 2, 1, 3), (1, 1, 2, 1, 1)], ids=str)
    def test_other_axes_decode(self, step: StepPast, sizes: tuple[int, ...]) -> None:
        keys = PackedTensor(step, "keys")
        assert torch.equal(keys.repeat(*sizes), step.decoded.keys.repeat(*sizes))
        assert step.counters.path == "decoded"


def test_a_linear_layer_over_cached_vectors_is_latent_attention(step: StepPast) -> None:
    weight = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    got = F.linear(PackedTensor(step, "keys"), weight)
    assert torch.equal(got, F.linear(step.decoded.keys, weight))
    assert step.counters.reasons == {LATENT: 1}
