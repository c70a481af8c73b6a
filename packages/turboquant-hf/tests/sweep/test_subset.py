"""Every named family over packed pages: the stock cache's tokens and logits, and no family on a slower path."""

from __future__ import annotations

import warnings

import pytest

from .expectations import MULTIMODAL, differences, expected_rows
from .fronted_row import sweep_fronted
from .multimodal import FRONTED
from .row import sweep_model
from .subset import SUBSET


@pytest.mark.parametrize("model_type", SUBSET)
def test_family(model_type: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        row = sweep_model(model_type)
    assert not differences(expected_rows(), {model_type: row})
    assert row.is_equal or row.refused


@pytest.mark.parametrize("name", FRONTED)
def test_family_behind_a_tower_or_an_encoder(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        row = sweep_fronted(name)
    assert not differences(expected_rows(MULTIMODAL), {name: row})
    assert row.is_equal
