"""The operations as custom operators ``torch.ops.turboquant_triton``, so that ``torch.compile(fullgraph=True)`` works.

:class:`turboquant_triton.TritonProvider` calls these while a graph is traced. See :mod:`turboquant_core.operators`.
"""

from __future__ import annotations

from typing import Any

from turboquant_core.operators import Operators
from turboquant_core.token_step_operator import TokenStepOperator

PROVIDERS: dict[str, Any] = {}
"""Who computes: every :class:`TritonProvider` by its variant."""

OPERATORS = Operators("turboquant_triton", PROVIDERS)
TOKEN_STEP = TokenStepOperator("turboquant_triton", PROVIDERS)
