"""The one number stored beside the codes of a vector, and the rules that choose it.

With ``z`` the rotated vector and ``l`` the levels of its codes, both ``[..., head_dim]``, the stored scale ``s``
makes ``s * l`` the estimate of ``z``:

==================  ====================  =====================================================
rule                scale                 property
==================  ====================  =====================================================
``unbiased``        ``|z|^2 / <z, l>``    ``<q, s l>`` is unbiased for every query (EDEN)
``least_squares``   ``<z, l> / |l|^2``    smallest reconstruction error
``renorm``          ``|z| / |l|``         the estimate has the vector's norm
``norm``            ``|z| / sqrt(d)``     the paper's (arXiv 2504.19874, section 3.1)
``searched``        ``|z|^2 / <z, l>``    unbiased, of the codes nearest in direction among a few
==================  ====================  =====================================================

The other rules take the nearest level of each coordinate of ``u = z / rms(z)``. ``searched`` does so for ``m u`` with
each ``m`` of :data:`MULTIPLIERS` and keeps the codes whose levels have the largest cosine with ``z``, which with an
unbiased scale are those of the smallest error (as the search over scalings of Extended RaBitQ, arXiv 2409.09913).
"""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

ScaleRule: TypeAlias = Literal["unbiased", "least_squares", "renorm", "norm", "searched"]
SCALE_RULES: tuple[str, ...] = get_args(ScaleRule)
CACHE_RULE: ScaleRule = "searched"
"""What caches use for keys and for values unless they are told otherwise."""
MULTIPLIERS = (0.875, 0.9375, 1.0, 1.0625, 1.125)
"""Of the rule ``searched``, evenly spaced, exact in binary; of equals the first is kept."""


def check_scale_rule(rule: str, allowed: tuple[str, ...] = SCALE_RULES) -> None:
    """Raise ``ValueError`` for a rule that is not ``allowed``."""
    if rule not in allowed:
        raise ValueError(f"scale rule is {rule!r}; choose one of {', '.join(allowed)}")


def vector_scale(rotated: Tensor, levels: Tensor, rule: ScaleRule) -> Tensor:
    """Scale of each vector before it is stored.

    Args:
        rotated: float ``[..., head_dim]``, the orthonormally rotated vectors.
        levels: float ``[..., head_dim]``, the levels of their codes.
        rule: which rule of the module's table.

    Returns:
        float ``[...]``; 0 for a zero vector.
    """
    energy = rotated.square().sum(-1)
    if rule == "norm":
        return (energy / rotated.shape[-1]).sqrt()
    power = levels.square().sum(-1)
    if rule == "renorm":
        return (energy / power).sqrt()
    inner = (rotated * levels).sum(-1)
    return inner / power if rule == "least_squares" else _unbiased(energy, inner)


def _unbiased(energy: Tensor, inner: Tensor) -> Tensor:
    # A zero vector has energy 0 and inner 0; its scale is 0, not 0/0.
    return torch.where(inner > 0, energy / inner, torch.zeros_like(energy))


def to_stored(scale: Tensor) -> Tensor:
    """Scale as stored: fp16 ``[...]``, saturated at 65504 so that a huge vector stays finite; NaN stays NaN."""
    return scale.clamp(max=torch.finfo(torch.float16).max).to(torch.float16)
