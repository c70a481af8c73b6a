"""Codes nearest in direction: the search of the scale rule ``searched`` (:mod:`turboquant_core.scale`)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .scale import MULTIPLIERS


def searched_codes(unit: Tensor, nearest: Callable[[Tensor], Tensor], levels_of: Callable[[Tensor], Tensor]) -> Tensor:
    """The nearest codes of ``unit`` times one of :data:`MULTIPLIERS` whose levels have the largest cosine with it.

    Args:
        unit: float ``[..., head_dim]`` of unit variance.
        nearest: uint8 codes of the nearest levels of such a tensor.
        levels_of: levels of such codes.

    Returns:
        uint8 ``[..., head_dim]``; the first multiplier's for a vector of zeros.
    """
    codes = nearest(unit * MULTIPLIERS[0])
    largest = _squared_cosine(unit, levels_of(codes))
    for multiplier in MULTIPLIERS[1:]:
        other = nearest(unit * multiplier)
        cosine = _squared_cosine(unit, levels_of(other))
        better = cosine > largest
        codes, largest = torch.where(better, other, codes), torch.where(better, cosine, largest)
    return codes


def _squared_cosine(unit: Tensor, levels: Tensor) -> Tensor:
    """``[..., 1]``, times the energy of ``unit``; a level has its coordinate's sign, so that no cosine is negative."""
    return (unit * levels).sum(-1, keepdim=True).square() / levels.square().sum(-1, keepdim=True)
