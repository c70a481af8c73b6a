"""What a short calibration text says about each layer: means, energies and the second moment of queries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from scoring import FULL, Observer, log_probabilities
from torch import Tensor

from turboquant_core.shaping import output_moment, query_moment


@dataclass(frozen=True)
class Calibration:
    """Per layer, float32.

    Attributes:
        key_mean: ``[kv_heads, head_dim]``, after the position embedding.
        query_moment: ``[kv_heads, head_dim, head_dim]``, ``E[q q^T]`` over tokens and the query heads of a KV head.
        key_energy: ``[kv_heads, head_dim]``, the mean square of each channel.
        value_energy: the same of values.
        output_moment: the shape of ``query_moment``, ``sum(W_o^T W_o)`` over those heads, from the weights alone.
        tokens: that were read.
    """

    key_mean: list[Tensor]
    query_moment: list[Tensor]
    key_energy: list[Tensor]
    value_energy: list[Tensor]
    output_moment: list[Tensor]
    tokens: int

    @property
    def device(self) -> torch.device:
        """Of the model that was calibrated."""
        return self.key_mean[0].device


class _Sums(Observer):
    def __init__(self) -> None:
        self.keys: dict[int, Tensor] = {}
        self.queries: dict[int, Tensor] = {}
        self.key_energy: dict[int, Tensor] = {}
        self.value_energy: dict[int, Tensor] = {}
        self.outputs: dict[int, Tensor] = {}

    def __call__(self, module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor) -> None:
        layer, heads = module.layer_idx, key.shape[1]
        self.queries[layer] = self.queries.get(layer, 0) + query_moment(query, heads)
        self.keys[layer] = self.keys.get(layer, 0) + key.float().mean((0, 2))
        for energy, x in ((self.key_energy, key), (self.value_energy, value)):
            energy[layer] = energy.get(layer, 0) + x.float().square().mean((0, 2))
        if layer not in self.outputs:
            self.outputs[layer] = _output_moment(module, heads, query.shape[-1])


def _output_moment(module: torch.nn.Module, kv_heads: int, head_dim: int) -> Tensor:
    projection = getattr(module, "o_proj", None)
    if projection is None:
        raise SystemExit(f"{type(module).__name__} has no o_proj, whose weight says which errors of values matter")
    return output_moment(projection.weight, kv_heads, head_dim)


def random_rows(vocabulary: int, context: int, count: int, seed: int) -> list[Tensor]:
    """Rows of token ids ``[context]`` that say nothing: what a model makes of them comes from its weights alone."""
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randint(0, vocabulary, (count, context), generator=generator))


def calibrate(model: Any, rows: list[Tensor]) -> Calibration:
    """Read ``rows`` of token ids in full precision; ``model`` is prepared (:func:`scoring.prepare`)."""
    sums = _Sums()
    for ids in rows:
        log_probabilities(model, ids.unsqueeze(0), FULL, sums)
    layers = sorted(sums.keys)
    return Calibration(
        key_mean=[sums.keys[i] / len(rows) for i in layers],
        query_moment=[sums.queries[i] / len(rows) for i in layers],
        key_energy=[sums.key_energy[i] / len(rows) for i in layers],
        value_energy=[sums.value_energy[i] / len(rows) for i in layers],
        output_moment=[sums.outputs[i] for i in layers],
        tokens=sum(len(ids) for ids in rows),
    )
