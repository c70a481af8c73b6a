"""The operations as custom operators ``torch.ops.turboquant_triton``, so that ``torch.compile(fullgraph=True)`` works.

:class:`turboquant_triton.TritonProvider` calls these while a graph is traced. See :mod:`turboquant_core.operators`.
"""

from __future__ import annotations

from turboquant_core import KernelProvider
from turboquant_core.operators import Operators

PROVIDERS: dict[str, KernelProvider] = {}
"""Who computes: every :class:`TritonProvider` by its variant."""

OPERATORS = Operators("turboquant_triton", PROVIDERS)
