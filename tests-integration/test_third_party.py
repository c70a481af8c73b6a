"""A provider from outside passes the suite that core ships."""

from __future__ import annotations

import pytest
from example_turboquant_provider import ExampleProvider

from turboquant_core import ReferenceProvider
from turboquant_core.testing import ProviderConformance


class TestExampleProvider(ProviderConformance):
    head_dims = (64, 96, 128)
    page_sizes = (16,)
    group_sizes = (1, 4)
    must_run = True

    @pytest.fixture
    def provider(self) -> ExampleProvider:
        return ExampleProvider()


def test_it_does_not_inherit_what_it_replaces() -> None:
    assert ExampleProvider.decode is not ReferenceProvider.decode
