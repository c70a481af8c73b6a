"""What packing does to the attention of each layer: the figure behind a warning, before any text suffers."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from turboquant_core import Attended, PackedPast

from .handle import PackedTensor, StepPast
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
        offset_bits: bits of key precision spent on an offset that all keys share, ``log2(1 / (1 - share)) / 2`` with
            the share of the keys' energy that lies in their mean; the worst KV head.
    """

    layer_idx: int
    cosine: float | None
    offset_bits: float


class Probe:
    """What one layer has shown."""

    def __init__(self) -> None:
        self.cosines: list[Tensor] = []
        self.offset_bits = 0.0

    def see_keys(self, keys: Tensor) -> None:
        """``[kv_heads, tokens, head_dim]`` of one sequence without padding."""
        keys = keys.float()
        share = keys.mean(1).square().sum(-1) / keys.square().sum(-1).mean(1).clamp(min=torch.finfo(torch.float32).tiny)
        self.offset_bits = float((-0.5 * torch.log2((1 - share).clamp(min=2.0**-24))).max())

    def quality(self, layer_idx: int) -> LayerQuality:
        """The figures so far."""
        cosine = float(torch.cat(self.cosines).mean()) if self.cosines else None
        return LayerQuality(layer_idx, cosine, self.offset_bits)


def exact_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scaling: float,
    seq_starts: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Float32 result of :meth:`PackedPast.attend` over the exact keys and values ``[batch, kv_heads, length, d]``."""
    batch, q_heads, q_len, _ = query.shape
    length, group = keys.shape[2], q_heads // keys.shape[1]
    keys, values = (x.float().repeat_interleave(group, dim=1) for x in (keys, values))
    scores = scaling * (query.float() @ keys.transpose(-1, -2))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    position = torch.arange(length, device=query.device)
    visible = position <= position[length - q_len :].view(-1, 1)
    if seq_starts is not None:
        visible = visible & (position >= seq_starts.view(-1, 1, 1, 1))
    scores = scores.masked_fill(~visible, -math.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks.float().view(1, -1, 1, 1).expand(batch, -1, q_len, 1)), dim=-1)
    return scores.softmax(-1)[..., :length] @ values


@dataclass(frozen=True, slots=True)
class ProbedPast(PackedPast):
    """A packed past that keeps the exact vectors beside it and compares."""

    exact: tuple[Tensor, Tensor]
    probe: Probe

    def attend(self, query: Tensor, **options: Any) -> Attended:
        """As the packed past; the cosine to the exact result is noted."""
        attended = PackedPast.attend(self, query, **options)
        exact = exact_attention(query, *self.exact, **options)
        self.probe.cosines.append(torch.cosine_similarity(attended.out.float(), exact, dim=-1).flatten())
        return attended


class ProbedLayer(TurboQuantLayer):
    """A packed layer whose every attention is compared with the exact one."""

    def __init__(self, layer: TurboQuantLayer, n_layers: int) -> None:
        super().__init__(layer.layer_idx, n_layers, layer.options)
        self.probe = Probe()
        self.exact: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As a packed layer; the exact vectors are kept too."""
        keys, values = self.exact or (key_states[:, :, :0], value_states[:, :, :0])
        self.exact = torch.cat((keys, key_states), 2), torch.cat((values, value_states), 2)
        self.probe.see_keys(self.exact[0][0])
        return super().update(key_states, value_states, *args, **kwargs)

    def _handles(self) -> tuple[PackedTensor, PackedTensor]:
        if self.exact is None:
            return super()._handles()
        past = self.packed_sequences.past()
        packed = {name.name: getattr(past, name.name) for name in fields(PackedPast)}
        step = StepPast(ProbedPast(**packed, exact=self.exact, probe=self.probe), self.dtype, self.counters)
        return PackedTensor(step, "keys"), PackedTensor(step, "values")


def probe_layers(cache: TurboQuantCache) -> dict[int, Probe]:
    """Replace the packed layers of an empty cache by probed ones; the probe of each by layer index."""
    n_layers = len(cache.layers)
    probed = {
        index: ProbedLayer(layer, n_layers)
        for index, layer in enumerate(cache.layers)
        if isinstance(layer, TurboQuantLayer)
    }
    cache.layers = [probed.get(index, layer) for index, layer in enumerate(cache.layers)]
    return {index: layer.probe for index, layer in probed.items()}


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
            f"{max(layer.offset_bits for layer in offset):.1f} bits of their precision: use center_keys=True"
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
