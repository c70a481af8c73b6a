"""What a decode step costs the host besides its kernels: a GPU waits for every operation that is dispatched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from turboquant_core import Attended, CacheCodec, KernelRequest, ReferenceProvider, selection
from turboquant_hf import TurboQuantCache
from turboquant_hf.attention import turboquant_attention

MOST_OPERATIONS = 30
"""Of an update and its attention with the default window: views count too, and two of :class:`NoKernels`."""
MORE_OF_SINKS = 2
"""Sinks are put before the recent keys and values."""
MOST_OPERATIONS_OF_AN_UPDATE = 2
"""The copies of a token's key and value; what a step needs besides is made for 16 steps, or for a page, at once."""


class NoKernels(ReferenceProvider):
    """Stores nothing and attends to nothing."""

    name = "none"

    def unsupported_reason(self, request: KernelRequest) -> str | None:
        """See :meth:`KernelProvider.unsupported_reason`."""
        return None

    def store(self, key: Tensor, value: Tensor, pages: Tensor, slot_mapping: Tensor, codec: CacheCodec) -> None:
        """See :meth:`KernelProvider.store`."""

    def attend(self, query: Tensor, *_: Any, **options: Any) -> Attended:
        """See :meth:`KernelProvider.attend`."""
        return Attended(query, query[..., 0].float())


class Counter(TorchDispatchMode):
    """Counts operators."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count and call."""
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.default_window
@pytest.mark.parametrize("options", [{}, {"sink_tokens": 4}], ids=["default window", "sinks too"])
def test_operations_of_a_step(llama: Any, monkeypatch: pytest.MonkeyPatch, options: dict[str, int]) -> None:
    monkeypatch.setattr(selection, "load_provider", lambda name: NoKernels())
    cache = TurboQuantCache(llama.config, provider="none", center_keys=False, **options)
    module = llama.model.layers[0].self_attn
    keys, values, query = (torch.zeros(1, heads, 40, 32, dtype=torch.bfloat16) for heads in (2, 2, 4))
    cache.update(keys, values, 0)
    key, value, one = (x[:, :, :1] for x in (keys, values, query))
    with torch.no_grad():
        cache.update(key, value, 0)
        with Counter() as counter:
            handles = cache.update(key, value, 0)
            assert counter.count <= MOST_OPERATIONS_OF_AN_UPDATE
            turboquant_attention(module, one, *handles, None, scaling=0.1)
    assert counter.count <= MOST_OPERATIONS + (MORE_OF_SINKS if options else 0)
    assert cache.layers[0].counters.path == "fused"


@pytest.mark.default_window
def test_operations_of_a_step_of_a_padded_batch(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first layer reads the mask; those after it take as many operations as without one."""
    monkeypatch.setattr(selection, "load_provider", lambda name: NoKernels())
    cache = TurboQuantCache(llama.config, provider="none", center_keys=False)
    module = llama.model.layers[0].self_attn
    keys, query = (torch.zeros(2, heads, 40, 32, dtype=torch.bfloat16) for heads in (2, 4))
    mask = torch.ones(2, 1, 1, 42, dtype=torch.bool)
    mask[1, ..., :7] = False
    cache.update(keys, keys, 0)
    key, one = (x[:, :, :1] for x in (keys, query))
    with torch.no_grad():
        cache.update(key, key, 0)
        handles = cache.update(key, key, 0)
        turboquant_attention(module, one, *handles, mask, scaling=0.1)
        with Counter() as counter:
            turboquant_attention(module, one, *handles, mask, scaling=0.1)
    assert counter.count <= MOST_OPERATIONS - MOST_OPERATIONS_OF_AN_UPDATE
    assert cache.layers[0].counters.path == "fused"
