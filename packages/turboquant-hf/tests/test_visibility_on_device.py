"""A mask that is read on the device: a causal one with left padding is taken, any other refused, as the host says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from turboquant_hf.visibility import Visibility, pattern, read_mask
from turboquant_hf.visibility_on_device import visibility_on_device

LENGTH = 12
HIDDEN = torch.finfo(torch.float16).min


def on_device(mask: torch.Tensor, end: int, batch: int, q_len: int, window: int | None) -> Visibility:
    found = visibility_on_device(mask, torch.tensor(end), batch, q_len, LENGTH, True, window)
    assert isinstance(found, Visibility)
    return found


def additive(visible: torch.Tensor) -> torch.Tensor:
    return torch.zeros(visible.shape, dtype=torch.float16).masked_fill(~visible, HIDDEN)


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_as_the_pattern_says(data: st.DataObject) -> None:
    q_len, window = data.draw(st.integers(1, 4)), data.draw(st.none() | st.integers(1, 6))
    end = data.draw(st.integers(q_len, LENGTH))
    starts = torch.tensor(data.draw(st.lists(st.integers(0, end - 1), min_size=1, max_size=3)))
    batch = len(starts)
    visible = pattern(starts, q_len, LENGTH, True, window, end)
    flips = data.draw(st.lists(st.tuples(*(st.integers(0, n - 1) for n in visible.shape)), max_size=2, unique=True))
    for at in flips:
        visible[at] = ~visible[at]
    mask = visible.unsqueeze(1)
    if data.draw(st.booleans()):
        mask = additive(mask)
    row = visible[:, -1 if window is None else 0]
    first = row.int().argmax(-1)
    if torch.equal(visible, pattern(first, q_len, LENGTH, True, window, end)):
        found = on_device(mask, end, batch, q_len, window)
        assert found.seq_starts is not None
        assert (found.causal, found.seq_starts.tolist(), found.window) == (True, first.tolist(), window)
    else:
        assert flips or not row.any(-1).all()
        with pytest.raises(ValueError, match="a compiled step over a packed cache needs a mask that is causal"):
            on_device(mask, end, batch, q_len, window)


def test_one_row_for_several_queries_and_sequences() -> None:
    visible = (torch.arange(LENGTH) < 9).view(1, 1, 1, -1)
    found = on_device(visible, 9, 3, 4, None)
    assert found.seq_starts is not None
    assert (found.causal, found.seq_starts.tolist()) == (False, [0, 0, 0])


def test_a_bias_is_refused() -> None:
    mask = additive((torch.arange(LENGTH) < 9).view(1, 1, 1, -1))
    mask[..., 3] = -1.0
    with pytest.raises(ValueError, match="needs a mask that is causal with left padding"):
        on_device(mask, 9, 1, 1, None)


@pytest.mark.parametrize("end", [8, 10])
def test_a_cache_of_another_length_is_refused(end: int) -> None:
    visible = (torch.arange(LENGTH) < 9).view(1, 1, 1, -1)
    with pytest.raises(ValueError, match="the cache holds other tokens than it shows"):
        on_device(visible, end, 1, 1, None)


def test_the_host_says_the_same() -> None:
    starts = torch.tensor([0, 5])
    mask = pattern(starts, 2, LENGTH, True, None, 9).unsqueeze(1)
    found, read = on_device(mask, 9, 2, 2, None), read_mask(mask, 2, 2, LENGTH, True, None, 9)
    assert isinstance(read, Visibility)
    assert found.seq_starts is not None and read.seq_starts is not None  # noqa: PT018 - narrows both
    assert torch.equal(found.seq_starts, read.seq_starts)
    assert (found.causal, found.window) == (read.causal, read.window)
