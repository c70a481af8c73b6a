"""The caches that ``transformers_decode.py`` compares: how each is made, and why one is absent."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from report import version
from transformers import DynamicCache, QuantizedCache

from turboquant_hf import TurboQuantCache, patch_model, unpatch_model
from turboquant_hf.summary import dense_memory

BITS = (4, 3, 2)
FUSED_TURBOQUANT = "fused-turboquant"


@dataclass(frozen=True)
class Contender:
    """A cache under test.

    Attributes:
        name: as in the tables.
        prepare: context that gives an empty cache for a model and puts the model back at its end.
        absent: why it cannot run on this machine; None when it can.
    """

    name: str
    prepare: Callable[[Any], AbstractContextManager[Any]]
    absent: str | None = None


@contextmanager
def _stock(model: Any) -> Any:
    yield DynamicCache(config=model.config)


def _packed(bits: int) -> Contender:
    @contextmanager
    def prepare(model: Any) -> Any:
        try:
            yield patch_model(model, bits=bits, verify=False)
        finally:
            unpatch_model(model)

    return Contender(f"turboquant {bits} bit", prepare)


def _quantized(backend: str, distribution: str | None, bits: int | None) -> Contender:
    @contextmanager
    def prepare(model: Any) -> Any:
        options = {} if bits is None else {"nbits": bits}
        if backend == "hqq":
            options |= {"axis_key": 1, "axis_value": 1}
        yield QuantizedCache(backend=backend, config=model.config, **options)

    absent = None
    if distribution is not None and version(distribution) is None:
        absent = f"{distribution} is not installed"
    return Contender(f"QuantizedCache {backend}" + (f" {bits} bit" if bits else ""), prepare, absent)


def _fused_turboquant(bits: int) -> Contender:
    @contextmanager
    def prepare(model: Any) -> Any:
        from fused_turboquant import hf

        try:
            yield hf.patch_model(model, bits=bits, verify=False)
        finally:
            hf.unpatch_model(model)

    installed = version(FUSED_TURBOQUANT)
    absent = f"{FUSED_TURBOQUANT} is not installed" if installed is None else None
    return Contender(" ".join(filter(None, (FUSED_TURBOQUANT, installed, f"{bits} bit"))), prepare, absent)


def contenders() -> list[Contender]:
    """All of them; the ordinary cache first."""
    return [
        Contender("DynamicCache bf16", _stock),
        *(_packed(bits) for bits in BITS),
        _quantized("quanto", "optimum-quanto", 4),
        _quantized("hqq", "hqq", 4),
        _quantized("fp8", None, None),
        _fused_turboquant(4),
    ]


def stored_bytes(cache: Any) -> int | None:
    """Bytes of keys and values, scales included; None for a cache that does not say."""
    if isinstance(cache, TurboQuantCache):
        return cache.memory().stored
    if type(cache) is DynamicCache:
        return sum(dense_memory(layer).stored for layer in cache.layers)
    return None
