"""What packing does to the attention of each layer: the figure behind a warning, before any text suffers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from turboquant_core import Attended, Gathered, WindowedPast, attend_dense
from turboquant_core.doctor import offset_bits

from .layer import TurboQuantLayer

if TYPE_CHECKING:
    from .cache import TurboQuantCache

OFFSET_LIMIT_BITS = 3.0
"""Trained models without key biases stay below 2; a model whose biases dominate its keys has 3 to 6."""
COSINE_LIMIT = 0.85
"""At 3 bits, small trained models stay above 0.9 in every layer; with dominating key biases they fall below 0.8."""


class QualityWarning(UserWarning):
    """Packing changes the attention of a model more than it should."""


@dataclass(frozen=True, slots=True)
class LayerQuality:
    """One layer on the verification prompt.

    Attributes:
        layer_idx: position in the model.
        cosine: mean cosine of the attention output over packed pages and over the exact keys and values, for the same
            queries; None where attention was not packed.
        offset_bits: bits of key precision spent on an offset that all keys share
            (:func:`turboquant_core.doctor.offset_bits`); the worst KV head.
    """

    layer_idx: int
    cosine: float | None
    offset_bits: float


class QualityProbe:
    """What one layer has shown: its exact vectors stay beside the packed ones."""

    def __init__(self) -> None:
        self.cosines: list[Tensor] = []
        self.offset_bits = 0.0
        self._exact: Gathered | None = None

    def see(self, keys: Tensor, values: Tensor) -> None:
        """Vectors ``[batch, kv_heads, tokens, d]`` of an update; the first sequence has no padding."""
        old = self._exact or (keys[:, :, :0], values[:, :, :0])
        self._exact = Gathered(torch.cat((old[0], keys), 2), torch.cat((old[1], values), 2))
        self.offset_bits = float(offset_bits(self._exact.keys[0]).max())

    def watch(self, past: WindowedPast) -> WindowedPast:
        """A past whose every attention is compared with the exact one."""
        if self._exact is None:
            return past
        exact = Gathered(*(x[:, :, -past.length :] for x in self._exact))
        return ProbedPast(past.packed, past.sinks, past.recent, exact=exact, cosines=self.cosines)

    def quality(self, layer_idx: int) -> LayerQuality:
        """The figures so far."""
        cosine = float(torch.cat(self.cosines).mean()) if self.cosines else None
        return LayerQuality(layer_idx, cosine, self.offset_bits)


def exact_attention(
    query: Tensor,
    exact: Gathered,
    *,
    scaling: float,
    seq_starts: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Float32 result of :meth:`WindowedPast.attend` over the exact keys and values ``[batch, kv_heads, length, d]``."""
    q_len, length = query.shape[2], exact.keys.shape[2]
    position = torch.arange(length, device=query.device)
    at = position[length - q_len :].view(1, -1, 1)
    visible = (position <= at) & (position > at - (window or length))
    if seq_starts is not None:
        visible = visible & (position >= seq_starts.view(-1, 1, 1))
    return attend_dense(query, *exact, visible, scaling=scaling, softcap=softcap, sinks=sinks).out


@dataclass(frozen=True, slots=True)
class ProbedPast(WindowedPast):
    """A past that keeps the exact vectors beside it and compares."""

    exact: Gathered
    cosines: list[Tensor]

    def attend(self, query: Tensor, *, latest_start: int | None = None, **options: Any) -> Attended:
        """As the packed past; the cosine to the exact result is noted."""
        attended = WindowedPast.attend(self, query, latest_start=latest_start, **options)
        exact = exact_attention(query, self.exact, **options)
        self.cosines.append(torch.cosine_similarity(attended.out.float(), exact, dim=-1).flatten())
        return attended


def probe_layers(cache: TurboQuantCache) -> dict[int, QualityProbe]:
    """Watch the packed layers of an empty cache; the probe of each by layer index."""
    probes = {}
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, TurboQuantLayer):
            layer.probe = probes[index] = QualityProbe()
    return probes


def concerns(layers: tuple[LayerQuality, ...], *, centered: bool) -> list[str]:
    """Sentences for a warning; none when all is well.

    Args:
        layers: what was measured.
        centered: keys were centred, so that their offset costs nothing.
    """
    found = []
    offset = [layer for layer in layers if layer.offset_bits >= OFFSET_LIMIT_BITS]
    if offset and not centered:
        found.append(
            f"keys share a constant offset in layers {_indices(offset)}, which costs up to "
            f"{max(layer.offset_bits for layer in offset):.1f} bits of their precision: use center_keys='auto' or True"
        )
    low = [layer for layer in layers if layer.cosine is not None and layer.cosine < COSINE_LIMIT]
    if low:
        found.append(
            f"attention over packed pages has a mean cosine to the exact one below {COSINE_LIMIT} in layers "
            f"{_indices(low)}: use more bits, or compare outputs with the stock cache before relying on these"
        )
    return found


def _indices(layers: list[LayerQuality]) -> str:
    return ", ".join(str(layer.layer_idx) for layer in layers)
