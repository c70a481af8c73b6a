"""What a third party needs to prove a kernel provider right: the conformance suite, its oracle, the golden bytes.

Install the extra ``turboquant-core[testing]`` (pytest, hypothesis), then::

    class TestMyProvider(ProviderConformance):
        @pytest.fixture
        def provider(self):
            return MyProvider()
"""

from __future__ import annotations

from .conformance import ProviderConformance
from .golden import GoldenCase, golden_cases
from .oracle import attention_oracle, decode_oracle, relative_error

__all__ = [
    "GoldenCase",
    "ProviderConformance",
    "attention_oracle",
    "decode_oracle",
    "golden_cases",
    "relative_error",
]
