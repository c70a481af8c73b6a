"""Provider and codecs of the layers of this process: chosen once, shared by equal layers."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import TypeVar

import torch
from torch import Tensor

from turboquant_core import CacheCodec, KernelProvider, KernelRequest, PageLayout, ProviderError, select_provider
from turboquant_core.scale import ScaleRule
from turboquant_core.selection import ENVIRONMENT_VARIABLE, REFERENCE_NAME

T = TypeVar("T")


def provider_for(request: KernelRequest, name: str | None) -> KernelProvider:
    """The provider of a layer.

    Raises:
        ProviderError: none fits, or the reference is asked for on a GPU.
    """
    return _provider(request, name or os.environ.get(ENVIRONMENT_VARIABLE) or None)


@cache
def _provider(request: KernelRequest, name: str | None) -> KernelProvider:
    on_cpu = request.device.type == "cpu"
    provider = outside_pools(request.device, partial(select_provider, request, name, allow_reference=on_cpu))
    if provider.name == REFERENCE_NAME and not on_cpu:
        raise ProviderError(
            f"kernel provider {REFERENCE_NAME!r} is for checking on a CPU, this engine runs on {request.device}: "
            f"drop turboquant.provider and {ENVIRONMENT_VARIABLE} to get the one that is installed for it"
        )
    return provider


def outside_pools(device: torch.device, work: Callable[[], T]) -> T:
    """Result of ``work``, done in a thread of its own on ``device``.

    vLLM loads weights and allocates the cache inside memory pools that sleep mode empties, and under a default device.
    Both belong to threads; what a provider or a codec keeps must lie outside. The default dtype, which is the model's
    meanwhile, belongs to the process: codebooks must not be rounded to it.
    """

    def placed() -> T:
        if device.index is not None:
            torch.accelerator.set_device_index(device.index)
        return work()

    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(placed).result()
    finally:
        torch.set_default_dtype(dtype)


@cache
def shared_codec(
    layout: PageLayout, seed: int, key_scale: ScaleRule, value_scale: ScaleRule, device: torch.device
) -> CacheCodec:
    """Codecs of all layers that have the same pages and no key center."""
    return own_codec(layout, seed, key_scale, value_scale, device, None)


def own_codec(
    layout: PageLayout,
    seed: int,
    key_scale: ScaleRule,
    value_scale: ScaleRule,
    device: torch.device,
    center: Tensor | None,
) -> CacheCodec:
    """Codecs of one layer; arguments as of :meth:`turboquant_core.CacheCodec.create`."""
    create = partial(CacheCodec.create, layout, seed=seed, key_scale=key_scale, value_scale=value_scale)
    return outside_pools(device, partial(create, center=center, device=device))


def graph_safe(provider: KernelProvider) -> bool:
    """Whether ``store`` and ``attend`` may be captured in CUDA graphs: the provider says so by ``graph_safe = True``.

    The Triton kernels of this project are known to be; any other provider has to say it.
    """
    return bool(getattr(provider, "graph_safe", provider.name == "triton"))
