"""Which kernel provider a layer gets. Asked once, when a layer or cache is built."""

from __future__ import annotations

import os
from importlib.metadata import EntryPoint, entry_points

from .errors import ProviderError
from .provider import KernelProvider, KernelRequest

ENTRY_POINT_GROUP = "turboquant.kernel_providers"
ENVIRONMENT_VARIABLE = "TURBOQUANT_PROVIDER"
REFERENCE_NAME = "reference"


def available_providers() -> dict[str, EntryPoint]:
    """Entry points of the group ``turboquant.kernel_providers`` by name; nothing is imported.

    Raises:
        ProviderError: two distributions register the same name.
    """
    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        other = found.setdefault(entry.name, entry)
        if other.value != entry.value:
            raise ProviderError(
                f"two kernel providers are named {entry.name!r}: {other.value} and {entry.value}; uninstall one"
            )
    return found


def _load(entry: EntryPoint) -> KernelProvider:
    provider = entry.load()()
    if not isinstance(provider, KernelProvider):
        raise ProviderError(f"{entry.value} gives a {type(provider).__name__}, which is no KernelProvider")
    return provider


def load_provider(name: str) -> KernelProvider:
    """Load the provider registered as ``name``, without asking what it supports.

    Raises:
        ProviderError: the name is unknown, or the provider cannot be imported or constructed.
    """
    entries = available_providers()
    if name not in entries:
        raise ProviderError(
            f"kernel provider {name!r} is not installed; installed: {', '.join(sorted(entries)) or 'none'}"
        )
    try:
        return _load(entries[name])
    except ProviderError:
        raise
    except Exception as error:
        raise ProviderError(f"kernel provider {name!r} failed to load: {error!r}") from error


def _strict(name: str, request: KernelRequest) -> KernelProvider:
    provider = load_provider(name)
    reason = provider.unsupported_reason(request)
    if reason is not None:
        raise ProviderError(f"kernel provider {name!r} does not support {request}: {reason}")
    return provider


def _candidates(names: list[str], reasons: dict[str, str]) -> list[KernelProvider]:
    loaded = []
    for name in names:
        try:
            loaded.append(load_provider(name))
        except ProviderError as error:
            reasons[name] = str(error)
    return sorted(loaded, key=lambda provider: (-provider.priority, provider.name))


def _automatic(request: KernelRequest, allow_reference: bool) -> KernelProvider:
    names = sorted(available_providers())
    reasons: dict[str, str] = {}
    if not allow_reference and REFERENCE_NAME in names:
        names.remove(REFERENCE_NAME)
        reasons[REFERENCE_NAME] = "not accepted by this caller, it is far too slow here"
    for provider in _candidates(names, reasons):
        reason = provider.unsupported_reason(request)
        if reason is None:
            return provider
        reasons[provider.name] = reason
    lines = "".join(f"\n  {name}: {reason}" for name, reason in sorted(reasons.items()))
    raise ProviderError(f"no kernel provider supports {request}:{lines or ' none is installed'}")


def select_provider(request: KernelRequest, name: str | None = None, *, allow_reference: bool = True) -> KernelProvider:
    """Choose the provider of a layer.

    Args:
        request: what the layer needs.
        name: a provider by name; None reads ``TURBOQUANT_PROVIDER``. A named provider works or raises: there is no
            fallback.
        allow_reference: whether automatic selection may end at the PyTorch reference.

    Returns:
        The named provider, else the one of highest priority that supports the request.

    Raises:
        ProviderError: the named provider is missing or unsupported, or no provider fits; the message lists each
            provider with its reason.
    """
    chosen = name if name is not None else os.environ.get(ENVIRONMENT_VARIABLE)
    return _strict(chosen, request) if chosen else _automatic(request, allow_reference)
