"""The reference passes the suite that every other provider has to pass."""

from __future__ import annotations

import pytest

from turboquant_core import ReferenceProvider
from turboquant_core.testing import ProviderConformance


class TestReference(ProviderConformance):
    must_run = True
    must_run_mixed = True

    @pytest.fixture
    def provider(self) -> ReferenceProvider:
        return ReferenceProvider()


class TestReferenceHeadDims(ProviderConformance):
    """Larger and smaller heads, one page size and group: what the first class does not visit."""

    head_dims = (16, 224, 512, 576)
    bits = ((4, 4), (3, 3), (2, 2), (3.5, 2.5))
    page_sizes = (32,)
    group_sizes = (3,)
    must_run = True
    must_run_mixed = True

    @pytest.fixture
    def provider(self) -> ReferenceProvider:
        return ReferenceProvider()
