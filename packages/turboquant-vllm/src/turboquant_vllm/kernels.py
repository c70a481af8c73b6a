"""Provider and codecs of the layers of this process: chosen once, shared by equal layers."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch

from turboquant_core import CacheCodec, KernelProvider, KernelRequest, PageLayout, ProviderError, select_provider
from turboquant_core.scale import ScaleRule
from turboquant_core.selection import ENVIRONMENT_VARIABLE, REFERENCE_NAME


def provider_for(request: KernelRequest, name: str | None) -> KernelProvider:
    """The provider of a layer.

    Raises:
        ProviderError: none fits, or the reference is asked for on a GPU.
    """
    return _provider(request, name or os.environ.get(ENVIRONMENT_VARIABLE) or None)


@cache
def _provider(request: KernelRequest, name: str | None) -> KernelProvider:
    on_cpu = request.device.type == "cpu"
    # A thread of its own: vLLM loads weights into a memory pool that sleep mode may empty, and pools belong to threads.
    # What a provider keeps (tables, results of its self-test) must not lie there.
    with ThreadPoolExecutor(1) as thread:
        provider = thread.submit(select_provider, request, name, allow_reference=on_cpu).result()
    if provider.name == REFERENCE_NAME and not on_cpu:
        raise ProviderError(
            f"kernel provider {REFERENCE_NAME!r} is for checking on a CPU, this engine runs on {request.device}: "
            f"drop turboquant.provider and {ENVIRONMENT_VARIABLE} to get the one that is installed for it"
        )
    return provider


@cache
def shared_codec(
    layout: PageLayout, seed: int, key_scale: ScaleRule, value_scale: ScaleRule, device: torch.device
) -> CacheCodec:
    """Codecs of all layers that have the same pages and no key center."""
    return CacheCodec.create(layout, seed=seed, key_scale=key_scale, value_scale=value_scale, device=device)


def graph_safe(provider: KernelProvider) -> bool:
    """Whether ``store`` and ``attend`` may be captured in CUDA graphs: the provider says so by ``graph_safe = True``.

    The Triton kernels of this project are known to be; any other provider has to say it.
    """
    return bool(getattr(provider, "graph_safe", provider.name == "triton"))
