"""Attention that a model writes out is packed attention, as long as packed attention knows what is in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.integrations.sdpa_attention import repeat_kv

from turboquant_hf.handle import PackedTensor, StepPast
from turboquant_hf.reasons import written_out

from .test_handle import step  # noqa: F401 - a fixture

HIDDEN = torch.finfo(torch.float32).min
Written = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def query(heads: int = 2, tokens: int = 1) -> Tensor:
    return torch.randn(3, heads, tokens, 32, generator=torch.Generator().manual_seed(1))


def causal(tokens: int) -> Tensor:
    """Additive, the second sequence padded on the left."""
    visible = torch.ones(3, 1, tokens, 20, dtype=torch.bool).tril(20 - tokens)
    visible[1, ..., :6] = False
    return torch.zeros(visible.shape).masked_fill(~visible, HIDDEN)


def by_matmul(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    weights = torch.matmul(q, k.transpose(-1, -2)) / 5.5 + mask
    return torch.matmul(F.dropout(F.softmax(weights, dim=-1), p=0.1, training=False), v)


def by_operator(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (0.3 * (q @ k.mT) + mask).softmax(-1).to(v.dtype) @ v


def by_bmm(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    batch, heads, tokens, _ = q.shape
    k, v = (x.reshape(batch * heads, -1, x.shape[-1]) for x in (k, v))
    weights = torch.bmm(q.reshape(batch * heads, tokens, -1), k.transpose(1, 2))
    assert weights.size() == (batch * heads, tokens, k.size(1))
    weights = (weights.view(batch, heads, tokens, -1) + mask).view(batch * heads, tokens, -1)
    return torch.bmm(torch.softmax(weights, dim=-1), v).view(batch, heads, tokens, -1)


def with_soft_cap(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    weights = torch.tanh(q @ k.permute(0, 1, 3, 2) * 0.3 / 2.0) * 2.0
    return torch.matmul(F.softmax(weights + mask, dim=-1, dtype=torch.float32).type_as(q), v)


def in_double(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    weights = torch.matmul(q.double(), k.to(torch.float64).transpose(2, 3)) + mask
    return torch.matmul(torch.softmax(weights, -1).float(), v)


PACKED: list[Written] = [by_matmul, by_operator, by_bmm, with_soft_cap, in_double]


@pytest.mark.parametrize("written", PACKED)
@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("repeats", [1, 3])
def test_it_is_attention_over_pages(step: StepPast, written: Written, tokens: int, repeats: int) -> None:  # noqa: F811
    q, mask = query(2 * repeats, tokens), causal(tokens)
    got = written(q, *(repeat_kv(PackedTensor(step, kind), repeats) for kind in ("keys", "values")), mask)
    assert type(got) is Tensor
    assert step.counters.paths == {"intercepted": 1}
    expected = written(q, *(repeat_kv(x, repeats) for x in step.decoded), mask)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def with_bias(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.mT + torch.linspace(0, 1, 20).view(1, 1, 1, 20) + mask).softmax(-1) @ v


def with_bias_in_the_product(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    flat = [x.reshape(6, -1, x.shape[-1]) for x in (q, k, v)]
    bias = torch.linspace(0, 1, 20).expand(6, 1, 20)
    return torch.bmm(bias.baddbmm(batch1=flat[0], batch2=flat[1].transpose(-1, -2), alpha=0.3).softmax(-1), flat[2])


def with_a_hole(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    mask = mask.clone()
    mask[2, ..., 9] = HIDDEN
    return (q @ k.mT + mask).softmax(-1) @ v


def with_einsum(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return torch.einsum("bhqk,bhkd->bhqd", (torch.einsum("bhqd,bhdk->bhqk", q, k.mT) + mask).softmax(-1), v)


def with_a_sink(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    weights = q @ k.mT + mask
    sunk = torch.cat([weights, torch.zeros(3, 2, 1, 1)], -1)
    return torch.matmul(sunk.softmax(-1)[..., :-1], v)


def in_place(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    weights = q @ k.mT
    weights.masked_fill_(mask < 0, HIDDEN)
    weights.mul_(0.5)
    weights *= 0.5
    return weights.softmax(-1) @ v


def with_another_softmax(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.mT + mask).softmax(-2) @ v


def scaled_after_the_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return ((q @ k.mT + mask.clamp(min=-1)) * 0.5).softmax(-1) @ v


def looked_at_on_the_way(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    weights = q @ k.mT + mask
    gate = torch.logsumexp(weights, -1, keepdim=True).sigmoid()
    return weights.softmax(-1) @ v * gate


def without_softmax(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.mT) @ v


def keys_as_values(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.mT + mask).softmax(-1) @ k


def dropped_out(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    torch.manual_seed(0)
    return F.dropout((q @ k.mT + mask).softmax(-1), p=0.5, training=True) @ v


@pytest.mark.parametrize(
    "written",
    [
        with_bias,
        with_bias_in_the_product,
        with_a_hole,
        with_einsum,
        with_a_sink,
        in_place,
        with_another_softmax,
        scaled_after_the_mask,
        looked_at_on_the_way,
        without_softmax,
        keys_as_values,
        dropped_out,
    ],
)
def test_anything_else_decodes_and_is_what_the_model_wrote(step: StepPast, written: Written) -> None:  # noqa: F811
    keys, values = PackedTensor(step, "keys"), PackedTensor(step, "values")
    got, expected = written(query(), keys, values, causal(1)), written(query(), *step.decoded, causal(1))
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    assert step.counters.paths == {"decoded": 1}


@pytest.mark.parametrize(
    ("written", "what"),
    [
        (with_bias, "a bias on its scores"),
        (with_bias_in_the_product, "a bias on its scores"),
        (with_a_hole, "mask that is neither causal nor padding"),
        (with_einsum, "einsum"),
    ],
)
def test_the_reason_is_in_words(step: StepPast, written: Written, what: str) -> None:  # noqa: F811
    written(query(), PackedTensor(step, "keys"), PackedTensor(step, "values"), causal(1))
    assert list(step.counters.reasons) == [written_out(what)]


def test_weights_that_a_model_returns_are_a_tensor(step: StepPast) -> None:  # noqa: F811
    weights = (query() @ PackedTensor(step, "keys").mT + causal(1)).softmax(-1)
    got = torch.matmul(weights, PackedTensor(step, "values"))
    assert isinstance(weights, Tensor)
    assert weights.shape == (3, 2, 1, 20)
    assert "shape" in repr(weights)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 2, 1))
    torch.testing.assert_close(got, (weights + 0) @ step.decoded.values)


@pytest.mark.parametrize("part", ["query", "mask"])
def test_a_change_in_place_is_an_error_and_no_wrong_answer(step: StepPast, part: str) -> None:  # noqa: F811
    parts = {"query": query(), "mask": causal(1)}
    weights = (parts["query"] @ PackedTensor(step, "keys").mT + parts["mask"]).softmax(-1)
    parts[part].mul_(2)
    with pytest.raises(RuntimeError, match="changed in place"):
        torch.matmul(weights, PackedTensor(step, "values"))


def test_autocast_decodes(step: StepPast) -> None:  # noqa: F811
    """Its products have another dtype than their factors."""
    keys, values = PackedTensor(step, "keys"), PackedTensor(step, "values")
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = (by_matmul(query(), *pair, causal(1)) for pair in ((keys, values), step.decoded))
    assert got.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(got, expected)
    assert step.counters.path == "decoded"


@pytest.mark.parametrize(
    "change",
    [
        lambda k: k.transpose(1, 2),
        lambda k: k.mT + 1,
        lambda k: k.mT[0],
        lambda k: k.mT.transpose(0, 1),
        lambda k: k.mT.permute(1, 0, 2, 3),
        lambda k: k.reshape(6, 20, 32).view(3, 2, 20, 32) + 0,
        lambda k: k.reshape(3, 40, 32),
        lambda k: k.reshape(6, -1, 32).mT.reshape(3, 2, 32, 20),
        lambda k: k.mT.contiguous().sum(1),
        lambda k: k.to(torch.float64).mT * 1,
        lambda k: k.double().to("cpu", torch.float32),
        lambda k: -k.mT,
    ],
)
def test_operands_are_what_tensors_are(step: StepPast, change: Callable[[Any], Any]) -> None:  # noqa: F811
    assert torch.equal(change(PackedTensor(step, "keys")), change(step.decoded.keys))
    assert step.counters.path == "decoded"


def test_sizes_of_operands_decode_nothing(step: StepPast) -> None:  # noqa: F811
    keys = PackedTensor(step, "keys").reshape(6, -1, 32).transpose(1, 2)
    assert (keys.size(), keys.size(1), keys.dim(), keys.dtype) == ((6, 32, 20), 32, 3, torch.float32)
    assert keys.device == torch.device("cpu")
    assert step.counters.path == "unused"
