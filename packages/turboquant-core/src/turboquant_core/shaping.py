"""Codes chosen for what reads the vector: the rounding error goes where a query or an output projection is blind.

The nearest level of each coordinate makes an error that points anywhere. What matters is ``e^T W e`` with ``e`` the
error and ``W`` the second moment of what multiplies the vector: for keys ``E[q q^T]`` of the queries, for values
``sum(W_o^T W_o)`` over the query heads that share them. A pass of error feedback along the Cholesky factor of ``W^-1``
(as in GPTQ, arXiv 2210.17323) and sweeps of coordinate descent find codes with a smaller one. The bytes mean what they
meant: every reader of the layout reads them, only encoding differs.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from .codec import Codec
from .halves import by_part
from .rotation import rotate

DAMPING = 0.2
SWEEPS = 2
_NEIGHBOURS = (-1, 0, 1)


@dataclass(frozen=True, slots=True)
class ShapedCodec(Codec):
    """A codec whose codes minimise a weighted error.

    Attributes:
        weight: float32 ``[kv_heads, head_dim, head_dim]``, rotated, mean diagonal 1 before damping.
        feedback: float32 of the same shape, the upper Cholesky factor of its inverse.
        sweeps: of coordinate descent after the feedback.
    """

    # Codec has a default for its last field, so that these need one; `shaped` always sets them.
    weight: Tensor | None = None
    feedback: Tensor | None = None
    sweeps: int = SWEEPS

    def nearest_codes(self, unit: Tensor) -> Tensor:
        """Codes of the smallest weighted error: float ``[..., kv_heads, head_dim]`` to uint8 of the same shape.

        Raises:
            ValueError: another number of heads than the weight has.
        """
        weight, feedback = _moments(self)
        heads = weight.shape[0]
        if unit.dim() < 2 or unit.shape[-2] != heads:
            raise ValueError(f"vectors have shape {tuple(unit.shape)}; this weight needs [..., kv_heads = {heads}, d]")
        rows = unit.reshape(-1, heads, unit.shape[-1]).transpose(0, 1)
        tables = [levels for levels, _ in self.tables]
        codes = _with_feedback(rows, feedback, self)
        search = _Search(rows, codes, weight, tables)
        for _ in range(self.sweeps):
            search.sweep()
        return search.codes.transpose(0, 1).reshape(unit.shape).to(torch.uint8)

    def to(self, device: torch.device | str) -> ShapedCodec:
        """The same codec with its tensors on ``device``."""
        weight, feedback = _moments(self)
        moved = Codec.to(self, device)
        kept: dict[str, Any] = {field.name: getattr(moved, field.name) for field in fields(Codec)}
        return ShapedCodec(**kept, weight=weight.to(device), feedback=feedback.to(device), sweeps=self.sweeps)


def shaped(codec: Codec, weight: Tensor, *, damping: float = DAMPING, sweeps: int = SWEEPS) -> ShapedCodec:
    """``codec`` with codes shaped by ``weight``.

    Args:
        codec: any codec with the scale rule ``unbiased``: with another, shaping trades a smaller spread of the error
            for a larger bias (measured, for values too).
        weight: symmetric positive semi-definite float ``[kv_heads, head_dim, head_dim]``, in the space of the vectors;
            its magnitude does not matter.
        damping: multiple of the identity added to the weight after its mean diagonal was made 1: the larger, the nearer
            to plain rounding.
        sweeps: of coordinate descent.

    Raises:
        ValueError: wrong shape, scale rule, damping or sweeps, or a weight that is not finite, symmetric and
            positive semi-definite.
    """
    _check(codec, weight, damping, sweeps)
    rotated = _rotated(weight.to(codec.device, torch.float64), codec.signs.double())
    rotated = (
        rotated / rotated.diagonal(dim1=1, dim2=2).mean(1).clamp_min(torch.finfo(torch.float64).tiny)[:, None, None]
    )
    rotated = rotated + damping * torch.eye(rotated.shape[-1], dtype=torch.float64, device=codec.device)
    feedback, failed = torch.linalg.cholesky_ex(torch.linalg.inv(rotated), upper=True)
    if bool(failed.any()):
        raise ValueError("weight is not positive semi-definite: compute it as a second moment, E[q q^T] or W_o^T W_o")
    kept: dict[str, Any] = {field.name: getattr(codec, field.name) for field in fields(Codec)}
    return ShapedCodec(**kept, weight=rotated.float(), feedback=feedback.float(), sweeps=sweeps)


def _check(codec: Codec, weight: Tensor, damping: float, sweeps: int) -> None:
    d = codec.layout.head_dim
    if weight.dim() != 3 or weight.shape[1:] != (d, d) or not weight.is_floating_point():
        raise ValueError(f"weight is {weight.dtype} {tuple(weight.shape)}; it must be float [kv_heads, {d}, {d}]")
    if codec.scale_rule != "unbiased":
        raise ValueError(f"scale rule is {codec.scale_rule!r}; shaped codes need 'unbiased', for values too")
    if not damping > 0 or sweeps < 0:
        raise ValueError(f"damping is {damping} and sweeps {sweeps}; they must be above 0, and 0 or more")
    asymmetry = float((weight - weight.mT).abs().max())
    # False for NaN, too.
    if not asymmetry <= 1e-3 * float(weight.abs().max()):
        raise ValueError("weight holds a NaN or an infinity, or is not symmetric: compute it as a second moment")


def _rotated(weight: Tensor, signs: Tensor) -> Tensor:
    once = rotate(weight, signs)
    both = rotate(once.mT.contiguous(), signs)
    return (both + both.mT) / 2


def _moments(codec: ShapedCodec) -> tuple[Tensor, Tensor]:
    if codec.weight is None or codec.feedback is None:
        raise ValueError("this codec has no weight: make shaped codecs with turboquant_core.shaping.shaped")
    return codec.weight, codec.feedback


def _with_feedback(unit: Tensor, feedback: Tensor, codec: Codec) -> Tensor:
    """Nearest codes ``[heads, n, d]``, the error of each coordinate carried on to those behind it."""
    rest, codes = unit.clone(), []
    for i, (levels, boundaries) in enumerate(_coordinate_tables(codec)):
        code = torch.bucketize(rest[..., i].contiguous(), boundaries)
        error = (rest[..., i] - levels[code]) / feedback[:, i, i, None]
        rest[..., i + 1 :] -= error.unsqueeze(-1) * feedback[:, None, i, i + 1 :]
        codes.append(code)
    return torch.stack(codes, -1)


def _coordinate_tables(codec: Codec) -> list[tuple[Tensor, Tensor]]:
    part_of = by_part(torch.arange(codec.layout.head_dim), codec.layout)
    return [table for part, table in zip(part_of, codec.tables, strict=True) for _ in part]


class _Search:
    """Coordinate descent on the weighted error, whose unbiased scale follows the codes."""

    def __init__(self, unit: Tensor, codes: Tensor, weight: Tensor, tables: list[Tensor]) -> None:
        self.unit, self.codes, self.weight = unit, codes, weight
        width = unit.shape[-1] // len(tables)
        self.levels = [table for table in tables for _ in range(width)]
        self.chosen = torch.stack([self.levels[i][codes[..., i]] for i in range(unit.shape[-1])], -1)
        self.weighted_unit, self.weighted = unit @ weight, self.chosen @ weight
        self.energy = unit.square().sum(-1, keepdim=True)
        # <u, l>, <u, W l> and <l, W l> of the present levels, [heads, n, 1].
        self.inner = (unit * self.chosen).sum(-1, keepdim=True)
        self.weighted_inner = (self.weighted_unit * self.chosen).sum(-1, keepdim=True)
        self.weighted_power = (self.weighted * self.chosen).sum(-1, keepdim=True)

    def sweep(self) -> None:
        """Move each coordinate once, to itself or a neighbouring level."""
        for i in range(self.unit.shape[-1]):
            self._move(i)

    def _move(self, i: int) -> None:
        levels, here = self.levels[i], self.chosen[..., i : i + 1]
        steps = torch.tensor(_NEIGHBOURS, device=self.codes.device)
        candidates = (self.codes[..., i : i + 1] + steps).clamp(0, len(levels) - 1)
        delta = levels[candidates] - here
        sums = (
            self.inner + delta * self.unit[..., i : i + 1],
            self.weighted_inner + delta * self.weighted_unit[..., i : i + 1],
            self.weighted_power
            + delta * (2 * self.weighted[..., i : i + 1] + delta * self.weight[:, i, i, None, None]),
        )
        best = self._error(*sums).argmin(-1, keepdim=True)
        self.inner, self.weighted_inner, self.weighted_power = (x.gather(-1, best) for x in sums)
        self.codes[..., i : i + 1] = candidates.gather(-1, best)
        step = delta.gather(-1, best)
        self.chosen[..., i : i + 1] += step
        self.weighted += step * self.weight[:, None, i]

    def _error(self, inner: Tensor, weighted_inner: Tensor, weighted_power: Tensor) -> Tensor:
        """``(u - s l)^T W (u - s l)`` less its constant term; infinite where no positive scale is unbiased."""
        scale = self.energy / inner
        error = scale * (scale * weighted_power - 2 * weighted_inner)
        return torch.where(inner > 0, error, torch.full_like(error, torch.inf))
