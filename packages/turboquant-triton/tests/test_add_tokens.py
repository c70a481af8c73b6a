"""One query token over a part that is done and a few exact tokens, against float64 attention over all of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from turboquant_core import Attended, Gathered, attend_dense
from turboquant_core.token_step import TokenStepProvider, attend_tokens
from turboquant_triton import TritonProvider

GPU = torch.cuda.is_available()
SCALING = 0.2
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 1e-5}
# Triton's interpreter cannot multiply matrices of bfloat16.
DTYPES = list(TOLERANCE) if GPU else [torch.float16, torch.float32]


def runs(
    tokens: list[int], batch: int, kv_heads: int, head_dims: tuple[int, int], dtype: torch.dtype
) -> list[Gathered]:
    """Views into longer buffers, as a window that moves on is."""
    made = []
    for count in tokens:
        room = [torch.randn(batch, kv_heads, count + 3, d).to(dtype) for d in head_dims]
        made.append(Gathered(*(x[:, :, 1 : 1 + count] for x in room)))
    return made


def oracle(
    query: Tensor, both: list[Gathered], softcap: float | None, sinks: Tensor | None, visible: Tensor | None = None
) -> Attended:
    """Attention in float64 arithmetic over the keys of all runs, or the ``visible`` ones of them."""
    keys, values = (torch.cat(pair, 2).double() for pair in zip(*both, strict=True))
    grouped = query.double().unflatten(1, (keys.shape[1], -1)).squeeze(3)
    scores = SCALING * grouped @ keys.transpose(-1, -2)
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    if visible is not None:
        scores = scores.masked_fill(~visible[:, None, None], -torch.inf)
    logits = scores
    if sinks is not None:
        column = sinks.double().view(1, keys.shape[1], -1, 1).expand(*scores.shape[:3], 1)
        logits = torch.cat((scores, column), -1)
    lse = logits.logsumexp(-1)
    out = torch.exp(scores - lse.unsqueeze(-1)) @ values
    return Attended(out.flatten(1, 2).unsqueeze(2), lse.flatten(1, 2).unsqueeze(2))


def on(device: torch.device, x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(device)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 40), min_size=1, max_size=2),
    st.sampled_from([(64, 64), (80, 64), (128, 128)]),
    st.integers(1, 2),
    st.sampled_from([1, 4, 40]),
    st.sampled_from([None, 5.0]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_against_float64(
    device: torch.device,
    dtype: torch.dtype,
    tokens: list[int],
    head_dims: tuple[int, int],
    batch: int,
    group: int,
    softcap: float | None,
    with_sinks: bool,
    with_center: bool,
    with_hidden: bool,
) -> None:
    torch.manual_seed(sum(tokens) + group)
    exact = runs(tokens, batch, 2, head_dims, dtype)
    visible = torch.rand(batch, sum(tokens)) < 0.5 if with_hidden else None
    (past,) = runs([7], batch, 2, head_dims, dtype)
    query = torch.randn(batch, 2 * group, 1, head_dims[0]).to(dtype)
    sinks = torch.randn(2 * group) if with_sinks else None
    center = torch.randn(2, head_dims[0]) if with_center and softcap is None and not with_sinks else None
    lacking = None if center is None else center[:, None].double()
    shifted = [Gathered(k if lacking is None else k.double() - lacking, v) for k, v in (past, *exact)]
    shown = None if visible is None else torch.cat((torch.ones(batch, 7, dtype=torch.bool), visible), 1)
    expected = oracle(query, shifted, softcap, sinks, shown)
    if visible is not None:
        # What no query sees may be bytes that nobody wrote.
        for run, hidden in zip(exact, (~visible).split(tokens, 1), strict=True):
            for x in run:
                x.masked_fill_(hidden[:, None, :, None], torch.nan)
    seen = oracle(query, shifted[:1], softcap, None)
    part = Attended(seen.out.to(device, dtype), seen.lse.to(device, torch.float32))
    got = TritonProvider().add_tokens(
        part, query.to(device), [Gathered(*(x.to(device) for x in run)) for run in exact],
        center=on(device, center), scaling=SCALING, softcap=softcap, sinks=on(device, sinks),
        visible=on(device, visible),
    )  # fmt: skip
    assert got is part
    torch.testing.assert_close(got.out.double().cpu(), expected.out, rtol=0, atol=4 * TOLERANCE[dtype])
    torch.testing.assert_close(
        got.lse.double().cpu(), expected.lse, rtol=0, atol=1e-3 if dtype == torch.float32 else 0.02
    )


def test_is_what_core_computes(device: torch.device) -> None:
    """The operation and its substitute in PyTorch; a query of another dtype than the tokens as well."""
    provider = TritonProvider()
    assert isinstance(provider, TokenStepProvider)
    exact = [Gathered(*(x.to(device) for x in run)) for run in runs([4, 16], 2, 2, (64, 64), torch.float16)]
    query = torch.randn(2, 8, 1, 64, device=device)
    part = Attended(torch.randn(2, 8, 1, 64, device=device), torch.randn(2, 8, 1, device=device))
    copy = Attended(part.out.clone(), part.lse.clone())

    class Plain:
        """A provider without the operation."""

    options = {"center": None, "scaling": SCALING, "softcap": None, "sinks": None}
    expected = attend_tokens(Plain(), copy, query, exact, **options)  # type: ignore[arg-type]
    got = attend_tokens(provider, part, query, exact, **options)
    assert got.out.data_ptr() == part.out.data_ptr()
    torch.testing.assert_close(got.out, expected.out, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.lse, expected.lse, rtol=1e-4, atol=1e-4)


def test_a_part_that_saw_nothing(device: torch.device) -> None:
    """Its output may be anything, NaN included."""
    (exact,) = (Gathered(*(x.to(device) for x in run)) for run in runs([5], 1, 1, (64, 64), torch.float16))
    query = torch.randn(1, 2, 1, 64, device=device, dtype=torch.float16)
    part = Attended(torch.full_like(query, torch.nan), torch.full((1, 2, 1), -torch.inf, device=device))
    visible = torch.ones(1, 1, 5, dtype=torch.bool, device=device)
    expected = attend_dense(query, *exact, visible, scaling=SCALING)
    got = TritonProvider().add_tokens(part, query, [exact], center=None, scaling=SCALING)
    torch.testing.assert_close(got.out.float(), expected.out, rtol=1e-2, atol=2e-3)
    torch.testing.assert_close(got.lse, expected.lse, rtol=1e-3, atol=1e-3)


def test_wrong_input_is_refused(device: torch.device) -> None:
    exact = [Gathered(*(x.to(device) for x in run)) for run in runs([4, 6], 2, 2, (64, 32), torch.float16)]
    query = torch.randn(2, 4, 1, 64, device=device, dtype=torch.float16)
    part = Attended(query[..., :32].contiguous(), query.new_zeros(2, 4, 1, dtype=torch.float32))
    before = part.out.clone()

    def refused(message: str, *, part: Attended = part, query: Tensor = query, **options: object) -> None:
        given_runs = options.pop("exact", exact)
        with pytest.raises(ValueError, match=message):
            TritonProvider().add_tokens(part, query, given_runs, **{"center": None, "scaling": 1.0, **options})  # type: ignore[arg-type]

    refused("there are 3 runs of exact tokens", exact=[*exact, exact[0]])
    refused("exact keys are torch.float16", exact=[exact[0], Gathered(exact[1].keys, exact[1].values.float())])
    refused(r"query is \(2, 3, 1, 64\)", query=query[:, :3])
    refused("part is", part=Attended(part.out[:, :2], part.lse))
    refused("part must be what attend gave", part=Attended(part.out, part.lse.double()))
    refused("softcap is -1", softcap=-1.0)
    refused("sinks are", sinks=torch.zeros(3, device=device))
    refused(
        r"visible is torch.bool \(2, 9\); the runs need torch.bool \(2, 10\)", visible=query[:, 0, :, :9].squeeze(1) > 0
    )
    refused("visible is torch.int32", visible=torch.ones(2, 10, dtype=torch.int32, device=device))
    assert torch.equal(part.out, before)


def test_a_query_that_sees_nothing(device: torch.device) -> None:
    (exact,) = (Gathered(*(x.to(device) for x in run)) for run in runs([5], 1, 1, (64, 64), torch.float16))
    query = torch.randn(1, 2, 1, 64, device=device, dtype=torch.float16)
    part = Attended(torch.full_like(query, torch.nan), torch.full((1, 2, 1), -torch.inf, device=device))
    visible = torch.zeros(1, 5, dtype=torch.bool, device=device)
    got = TritonProvider().add_tokens(part, query, [exact], center=None, scaling=SCALING, visible=visible)
    assert not got.out.any()
    assert torch.isneginf(got.lse).all()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_in_one_graph(device: torch.device, backend: str) -> None:
    torch.compiler.reset()
    exact = [Gathered(*(x.to(device) for x in run)) for run in runs([4, 16], 2, 2, (64, 64), torch.float16)]
    visible = torch.rand(2, 20, device=device) < 0.5
    provider = TritonProvider()

    def step(query: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        part = Attended(out * 1, lse * 1)
        options = {"center": None, "scaling": SCALING, "visible": visible}
        return tuple(attend_tokens(provider, part, query * 2, exact, **options))  # type: ignore[arg-type,return-value]

    inputs = (
        torch.randn(2, 8, 1, 64, device=device, dtype=torch.float16),
        torch.randn(2, 8, 1, 64, device=device, dtype=torch.float16),
        torch.randn(2, 8, 1, device=device),
    )
    compiled = torch.compile(step, backend=backend, fullgraph=True)
    for got, expected in zip(compiled(*inputs), step(*inputs), strict=True):
        assert torch.equal(got, expected)


def test_the_operator_is_registered_rightly(device: torch.device) -> None:
    """torch.library.opcheck: what is written is declared."""
    exact = [Gathered(*(x.to(device) for x in run)) for run in runs([4, 6], 1, 2, (64, 64), torch.float16)]
    query = torch.randn(1, 4, 1, 64, device=device, dtype=torch.float16)
    out, lse = torch.randn_like(query), torch.randn(1, 4, 1, device=device)
    keys, values = ([run[i] for run in exact] for i in (0, 1))
    visible = torch.rand(1, 10, device=device) < 0.5
    arguments = (out, lse, query, keys, values, None, SCALING, 5.0, None, visible, TritonProvider().name)
    torch.library.opcheck(torch.ops.turboquant_triton.add_tokens, arguments)


@pytest.mark.skipif(not GPU, reason="CUDA graphs need a GPU")
@pytest.mark.gpu
def test_in_a_cuda_graph() -> None:
    device = torch.device("cuda")
    exact = [Gathered(*(x.to(device) for x in run)) for run in runs([4, 16], 2, 2, (128, 128), torch.bfloat16)]
    query = torch.randn(2, 8, 1, 128, device=device, dtype=torch.bfloat16)
    part = Attended(torch.randn_like(query), torch.randn(2, 8, 1, device=device))
    before = Attended(part.out.clone(), part.lse.clone())

    def step() -> Attended:
        return TritonProvider().add_tokens(part, query, exact, center=None, scaling=SCALING)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for x, y in zip(part, before, strict=True):
        x.copy_(y)
    query.normal_()
    graph.replay()
    replayed = part.out.clone()
    for x, y in zip(part, before, strict=True):
        x.copy_(y)
    assert torch.equal(step().out, replayed)
