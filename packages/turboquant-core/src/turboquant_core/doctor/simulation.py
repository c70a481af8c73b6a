"""A model run over keys and values as packing makes them, by a stock cache of Transformers."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from ..codec import KEY_STREAM, VALUE_STREAM, Codec
from ..errors import TurboQuantError
from ..layout import VectorLayout
from ..scale import CACHE_RULE
from ..windows import Windows
from .statistics import round_trip

CHUNK_TOKENS = 32
"""Tokens of a forward pass where a recent window has to be seen: those before them are read from the cache."""


OLDEST_TRANSFORMERS = (5, 5)
_INSTALL = "pip install 'transformers>={}.{}'".format(*OLDEST_TRANSFORMERS)


class DoctorError(TurboQuantError, RuntimeError):
    """The doctor cannot examine what it was given."""


@cache
def transformers() -> Any:
    """The package, imported when it is first needed.

    Raises:
        DoctorError: it cannot be imported, or is too old.
    """
    try:
        library = importlib.import_module("transformers")
    except ImportError as error:
        raise DoctorError(f"the doctor runs models with Transformers ({error}): {_INSTALL}") from error
    if tuple(map(int, library.__version__.split(".")[:2])) < OLDEST_TRANSFORMERS:
        raise DoctorError(f"Transformers is {library.__version__}, too old for the doctor: {_INSTALL}")
    return library


@dataclass(frozen=True, slots=True)
class Treatment:
    """How the cache of each layer is coded.

    Attributes:
        bits: (keys, values) by layer; a layer that it lacks stays exact, and so does one of the two that is None.
        centers: float32 ``[kv_heads, head_dim]`` by layer.
        windows: tokens in full precision.
    """

    bits: Mapping[int, tuple[float | None, float | None]]
    centers: Mapping[int, Tensor] = field(default_factory=dict)
    windows: Windows = Windows()  # noqa: RUF009 (immutable)


class Simulation:
    """Keys and values ``[batch, kv_heads, tokens, head_dim]`` of each layer on their way from cache to attention."""

    def __init__(self, treatment: Treatment) -> None:
        self._treatment = treatment
        self._codecs: dict[tuple[int, bool], Codec] = {}

    def read(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """What attention reads in place of the exact vectors."""
        if layer not in self._treatment.bits:
            return keys, values
        key_bits, value_bits = self._treatment.bits[layer]
        return self._coded(layer, keys, key_bits, True), self._coded(layer, values, value_bits, False)

    def _coded(self, layer: int, x: Tensor, bits: float | None, is_key: bool) -> Tensor:
        windows, tokens = self._treatment.windows, x.shape[2]
        first, last = min(windows.sink_tokens, tokens), max(tokens - windows.recent_tokens, 0)
        if bits is None or last <= first:
            return x
        own = x[:, :, first:last].transpose(1, 2)
        coded = round_trip(own, self._codec(layer, x, bits, is_key)).transpose(1, 2).to(x.dtype)
        return torch.cat((x[:, :, :first], coded, x[:, :, last:]), dim=2)

    def _codec(self, layer: int, x: Tensor, bits: float, is_key: bool) -> Codec:
        known = self._codecs.get((layer, is_key))
        if known is None:
            known = Codec.create(
                VectorLayout(x.shape[-1], bits, "int8" if is_key else "cubic"),
                stream=KEY_STREAM if is_key else VALUE_STREAM,
                scale_rule=CACHE_RULE,
                center=self._treatment.centers.get(layer) if is_key else None,
                device=x.device,
            )
            self._codecs[layer, is_key] = known
        return known


def run(model: Any, ids: Tensor, treatment: Treatment | None) -> tuple[Tensor, Any]:
    """Logarithms of the next-token probabilities, float32 ``[tokens, vocabulary]``, and the cache of exact vectors.

    Every key and value, the token's own included, is read as ``treatment`` makes it; None leaves all exact.

    Args:
        model: of Transformers.
        ids: int64 ``[1, tokens]``.
        treatment: how.
    """
    past = transformers().DynamicCache(config=model.config)
    if treatment is not None:
        past.update = _treated(past.update, Simulation(treatment))
    step = CHUNK_TOKENS if treatment is not None and treatment.windows.recent_tokens else ids.shape[1]
    name = "cache" if "cache" in signature(model.forward).parameters else "past_key_values"
    logits = []
    with torch.no_grad():
        for chunk in ids.split(step, dim=1):
            logits.append(model(input_ids=chunk, use_cache=True, **{name: past}).logits[0].float())
    return torch.log_softmax(torch.cat(logits), dim=-1), past


def _treated(update: Callable[..., tuple[Tensor, Tensor]], simulation: Simulation) -> Callable[..., Any]:
    def read(keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return simulation.read(layer, *update(keys, values, layer, *args, **kwargs))

    return read


def divergence(exact: Tensor, got: Tensor) -> float:
    """Mean Kullback-Leibler divergence of ``got`` from ``exact``, log-probabilities ``[tokens, words]``, in nats."""
    return float((exact.exp() * (exact - got)).sum(-1).mean())


def keys_alone(treatment: Treatment, layer: int) -> Treatment:
    """The treatment of a layer's keys alone."""
    return replace(treatment, bits={layer: (treatment.bits[layer][0], None)})


def values_alone(treatment: Treatment, layer: int) -> Treatment:
    """The treatment of a layer's values alone."""
    return replace(treatment, bits={layer: (None, treatment.bits[layer][1])})
