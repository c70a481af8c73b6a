"""A provider that adds exact tokens itself does so in a decode step of windowed sequences, and only there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from turboquant_core import (
    Attended,
    CacheCodec,
    Gathered,
    PackedSequences,
    PageLayout,
    ReferenceProvider,
    VectorLayout,
    WindowedSequences,
    Windows,
)
from turboquant_core.token_step import TokenStepProvider, attend_tokens

LAYOUT = PageLayout(VectorLayout(32, 4, "int8"), VectorLayout(16, 4, "cubic"), page_size=16, kv_heads=2)
CENTER = torch.linspace(-1, 1, 64).view(2, 32)


class Stepping(ReferenceProvider):
    """Notes the runs that it is given, and computes as a provider without the operation does."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[list[int]] = []
        self.shown: list[list[list[bool]]] = []

    def add_tokens(self, part: Attended, query: Tensor, exact: Sequence[Gathered], **options: Any) -> Attended:
        self.seen.append([run.keys.shape[2] for run in exact])
        if options["visible"] is not None:
            self.shown.append(options["visible"].tolist())
        return attend_tokens(ReferenceProvider(), part, query, exact, **options)


def sequences(provider: ReferenceProvider, windows: Windows) -> WindowedSequences:
    torch.manual_seed(0)
    codec = CacheCodec.create(LAYOUT, center=CENTER)
    store = WindowedSequences(PackedSequences(2, codec, provider, torch.float32), windows)
    store.append(torch.randn(2, 2, 40, 32), torch.randn(2, 2, 40, 16))
    return store


def test_one_query_after_sinks_and_packed_tokens() -> None:
    provider = Stepping()
    assert isinstance(provider, TokenStepProvider)
    assert not isinstance(ReferenceProvider(), TokenStepProvider)
    windows = Windows(sink_tokens=3, recent_tokens=5)
    query = torch.randn(2, 4, 1, 32)
    got = sequences(provider, windows).past().attend(query, scaling=0.2)
    assert provider.seen == [[3, 5]]
    plain = sequences(ReferenceProvider(), windows).past().attend(query, scaling=0.2)
    torch.testing.assert_close(got.out, plain.out)
    torch.testing.assert_close(got.lse, plain.lse)


def test_one_run_without_sinks() -> None:
    provider = Stepping()
    sequences(provider, Windows(recent_tokens=7)).past().attend(torch.randn(2, 4, 1, 32), scaling=0.2)
    assert provider.seen == [[7]]


def test_several_queries_see_different_tokens() -> None:
    provider = Stepping()
    sequences(provider, Windows(recent_tokens=7)).past().attend(torch.randn(2, 4, 2, 32), scaling=0.2)
    assert provider.seen == []


def test_a_window_hides_some_of_the_exact_tokens() -> None:
    provider = Stepping()
    windows = Windows(sink_tokens=3, recent_tokens=7)
    query = torch.randn(2, 4, 1, 32)
    options = {"scaling": 0.2, "window": 5, "seq_starts": torch.tensor([0, 37], dtype=torch.int32)}
    got = sequences(provider, windows).past().attend(query, **options)  # type: ignore[arg-type]
    assert provider.seen == [[3, 7]]
    # Of ten, positions 0 to 2 and 33 to 39; the second sequence begins with the third last.
    assert provider.shown == [[[*5 * [False], *5 * [True]], [*7 * [False], *3 * [True]]]]
    several = torch.cat((torch.zeros_like(query), query), 2)
    expected = sequences(ReferenceProvider(), windows).past().attend(several, **options)  # type: ignore[arg-type]
    torch.testing.assert_close(got.out, expected.out[:, :, 1:])
    torch.testing.assert_close(got.lse, expected.lse[:, :, 1:])
