"""Prompts over raw and packed keys against attention in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from turboquant_core import CacheCodec, ReferenceProvider
from turboquant_vllm import plan as planning
from turboquant_vllm.options import LayerBits
from turboquant_vllm.packing import LayerShape
from turboquant_vllm.plan import PromptPlan, prompt_plan
from turboquant_vllm.prompts import PromptAttention
from turboquant_vllm.raw_attention import Scoring, torch_attention

HEADS, KV_HEADS, HEAD_DIM, PAGE = 4, 2, 16, 16


def scores_to_output(scores: Tensor, value: Tensor, sink: float | None) -> Tensor:
    logits = scores if sink is None else torch.cat((scores, scores.new_tensor([sink])))
    return torch.softmax(logits, 0)[: len(value)] @ value


def oracle(query: Tensor, key: Tensor, value: Tensor, scoring: Scoring, sinks: Tensor | None) -> Tensor:
    """Causal attention of the last ``q_len`` positions in float64, one query and head at a time."""
    out = torch.zeros(*query.shape[:2], HEAD_DIM, dtype=torch.float64)
    for i, head in ((i, head) for i in range(query.shape[0]) for head in range(HEADS)):
        last = key.shape[0] - query.shape[0] + i
        first = 0 if scoring.window is None else max(last - scoring.window + 1, 0)
        k, v = (x[first : last + 1, head // (HEADS // KV_HEADS)].double() for x in (key, value))
        scores = scoring.scaling * (k @ query[i, head].double())
        if scoring.softcap is not None:
            scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
        out[i, head] = scores_to_output(scores, v, None if sinks is None else float(sinks[head]))
    return out


class Step:
    """Sequences with a packed context and new tokens, as a step of the engine has them."""

    def __init__(self, rows: list[tuple[int, int]], scoring: Scoring, sinks: Tensor | None) -> None:
        generator = torch.Generator().manual_seed(0)
        self.rows, self.scoring, self.sinks = rows, scoring, sinks
        lengths = [context + new for context, new in rows]
        width = -(-max(lengths) // PAGE)
        table = torch.randperm(len(rows) * width, generator=generator).view(len(rows), width).int()
        self.keys, self.values = (
            [torch.randn(n, KV_HEADS, HEAD_DIM, generator=generator) for n in lengths] for _ in range(2)
        )
        self.query = torch.randn(sum(new for _, new in rows), HEADS, HEAD_DIM, generator=generator)
        layout = LayerShape(KV_HEADS, HEAD_DIM, 4).page_layout(LayerBits(), PAGE)
        codec = CacheCodec.create(layout)
        pages = torch.zeros(layout.pages_shape(len(rows) * width), dtype=torch.uint8)
        for row, length in enumerate(lengths):
            position = torch.arange(length)
            slots = table[row, position // PAGE].long() * PAGE + position % PAGE
            ReferenceProvider().store(self.keys[row], self.values[row], pages, slots, codec)
        self.attention = PromptAttention(torch_attention, scoring, ReferenceProvider(), codec, pages, sinks)
        starts = [0]
        for _, new in rows:
            starts.append(starts[-1] + new)
        plan = prompt_plan(starts, lengths, table, 0)
        assert plan is not None
        self.plan: PromptPlan = plan

    def new(self, tensors: list[Tensor]) -> Tensor:
        return torch.cat([x[context:] for x, (context, _) in zip(tensors, self.rows, strict=True)])

    def expected(self, *, own_packed: bool) -> Tensor:
        outputs = []
        for row, (context, new) in zip(self.plan.rows, self.rows, strict=True):
            table = self.plan.block_table[row.row : row.row + 1]
            packed = self.attention.provider.gather(
                self.attention.pages, table, self.attention.codec, start=0, stop=context + new, dtype=torch.float32
            )
            key, value = packed.keys[0].transpose(0, 1), packed.values[0].transpose(0, 1)
            if not own_packed:
                key = torch.cat((key[:context], self.keys[row.row][context:]))
                value = torch.cat((value[:context], self.values[row.row][context:]))
            query = self.query[row.first : row.last]
            outputs.append(oracle(query, key, value, self.scoring, self.sinks))
        return torch.cat(outputs)


rows = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 12)), min_size=1, max_size=3)


@pytest.mark.parametrize("own_packed", [False, True])
@settings(max_examples=25, deadline=None)
@given(
    rows=rows,
    window=st.one_of(st.none(), st.integers(1, 50)),
    softcap=st.sampled_from([None, 3.0]),
    sinks=st.booleans(),
    piece=st.sampled_from([7, 16, 1000]),
)
def test_prompts_see_what_they_should(
    own_packed: bool, rows: list[tuple[int, int]], window: int | None, softcap: float | None, sinks: bool, piece: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "PREFIX_TOKENS", piece)
        step = Step(rows, Scoring(0.3, window, softcap), torch.linspace(-1, 2, HEADS) if sinks else None)
        out = torch.full_like(step.query, torch.nan)
        if own_packed:
            step.attention.attend_packed(step.query, step.plan, out)
        else:
            step.attention.attend_raw(step.query, step.new(step.keys), step.new(step.values), step.plan, out)
    torch.testing.assert_close(out.double(), step.expected(own_packed=own_packed), rtol=1e-5, atol=1e-5)


def test_packed_prompts_do_not_depend_on_how_they_are_cut() -> None:
    scoring = Scoring(0.3, None, None)
    whole = Step([(0, 40)], scoring, None)
    out = torch.empty_like(whole.query)
    whole.attention.attend_packed(whole.query, whole.plan, out)
    for cut in (1, 16, 33):
        plan = prompt_plan([0, 40 - cut], [40], whole.plan.block_table, 0)
        assert plan is not None
        later = torch.empty_like(out[cut:])
        whole.attention.attend_packed(whole.query[cut:], plan, later)
        torch.testing.assert_close(later, out[cut:], rtol=1e-5, atol=1e-6)


def test_rows_that_decode_and_padded_rows_are_not_planned() -> None:
    table = torch.zeros(5, 3, dtype=torch.int32)
    plan = prompt_plan([0, 1, 2, 10, 12, 12], [30, 31, 8, 40, 0], table, 2)
    assert plan is not None
    assert plan.first_token == 2
    assert plan.tokens == 10
    assert [(row.row, row.first, row.last, row.context) for row in plan.rows] == [(2, 0, 8, 0), (3, 8, 10, 38)]
    assert plan.bounds.starts.tolist() == [0, 8, 10]
    assert plan.bounds.longest == 8
    assert prompt_plan([0, 1, 2, 2], [3, 4, 0], table, 2) is None


def test_long_contexts_come_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "PREFIX_TOKENS", 100)
    plan = prompt_plan([0, 5], [255], torch.zeros(1, 20, dtype=torch.int32), 0)
    assert plan is not None
    assert list(plan.rows[0].pieces()) == [(0, 100), (100, 200), (200, 250)]
