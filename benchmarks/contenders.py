"""The caches that ``transformers_decode.py`` compares: how each is made, and why one is absent."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from decode_modes import LABELS, Mode
from report import version
from transformers import DynamicCache, QuantizedCache, StaticCache

from turboquant_hf import TurboQuantCache, TurboQuantStaticCache, patch_model, unpatch_model
from turboquant_hf.summary import dense_memory

BITS = (4, 3, 2)
FUSED_TURBOQUANT = "fused-turboquant"


@dataclass(frozen=True)
class Contender:
    """A cache under test.

    Attributes:
        name: as in the tables.
        prepare: context that gives an empty cache for a model, with room for so many tokens where its room is fixed,
            and puts the model back at its end.
        absent: why it cannot run on this machine; None when it can.
        mode: how its decode steps are run.
    """

    name: str
    prepare: Callable[[Any, int], AbstractContextManager[Any]]
    absent: str | None = None
    mode: Mode = "eager"


@contextmanager
def _stock(model: Any, room: int) -> Any:
    yield DynamicCache(config=model.config)


@contextmanager
def _stock_static(model: Any, room: int) -> Any:
    yield StaticCache(config=model.config, max_cache_len=room)


def _packed(bits: int, mode: Mode = "eager") -> Contender:
    """Growing where steps are run as they are, else of fixed room."""

    @contextmanager
    def prepare(model: Any, room: int) -> Any:
        try:
            yield patch_model(model, bits=bits, verify=False, max_cache_len=None if mode == "eager" else room)
        finally:
            unpatch_model(model)

    return Contender(f"turboquant {bits} bit{LABELS[mode]}", prepare, mode=mode)


def _quantized(backend: str, distribution: str | None, bits: int | None) -> Contender:
    @contextmanager
    def prepare(model: Any, room: int) -> Any:
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
    def prepare(model: Any, room: int) -> Any:
        from fused_turboquant import hf

        try:
            yield hf.patch_model(model, bits=bits, verify=False)
        finally:
            hf.unpatch_model(model)

    installed = version(FUSED_TURBOQUANT)
    absent = f"{FUSED_TURBOQUANT} is not installed" if installed is None else None
    return Contender(" ".join(filter(None, (FUSED_TURBOQUANT, installed, f"{bits} bit"))), prepare, absent)


def contenders(mode: Mode = "eager") -> list[Contender]:
    """All that run their steps so; the ordinary cache first."""
    if mode != "eager":
        return [Contender(f"StaticCache bf16{LABELS[mode]}", _stock_static, mode=mode), _packed(BITS[0], mode)]
    return [
        Contender("DynamicCache bf16", _stock),
        *(_packed(bits) for bits in BITS),
        _quantized("quanto", "optimum-quanto", 4),
        _quantized("hqq", "hqq", 4),
        _quantized("fp8", None, None),
        _fused_turboquant(4),
    ]


def stored_bytes(cache: Any) -> int | None:
    """Bytes of keys and values, scales included, of all room where it is fixed; None for a cache that does not say."""
    if isinstance(cache, TurboQuantCache):
        return cache.memory().stored
    if isinstance(cache, TurboQuantStaticCache):
        return cache.memory().allocated
    if type(cache) in (DynamicCache, StaticCache):
        return sum(dense_memory(layer).stored for layer in cache.layers)
    return None
