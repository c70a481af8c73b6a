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

    def codes_of(self, unit: Tensor) -> Tensor:
        """Codes of the smallest weighted error: float ``[..., kv_heads, head_dim]`` to uint8 of the same shape.

        Raises:
            ValueError: another number of heads than the weight has.
        """
        weight, feedback = _moments(self)
        heads = weight.shape[0]
        if unit.dim() < 2 or unit.shape[-2] != heads:
            raise ValueError(f"vectors have shape {tuple(unit.shape)}; this weight needs [..., kv_heads = {heads}, d]")
        # Coordinates first: each step of the search then reads contiguous memory.
        rows = unit.reshape(-1, heads, unit.shape[-1]).permute(2, 1, 0).contiguous()
        tables = _coordinate_tables(self)
        search = _Search(rows, _with_feedback(rows, feedback, tables), weight, [levels for levels, _ in tables])
        for _ in range(self.sweeps):
            search.sweep()
        return search.codes.permute(2, 1, 0).reshape(unit.shape).to(torch.uint8)

    def to(self, device: torch.device | str) -> ShapedCodec:
        """The same codec with its tensors on ``device``."""
        weight, feedback = _moments(self)
        moved = Codec.to(self, device)
        kept: dict[str, Any] = {field.name: getattr(moved, field.name) for field in fields(Codec)}
        return ShapedCodec(**kept, weight=weight.to(device), feedback=feedback.to(device), sweeps=self.sweeps)


def query_moment(query: Tensor, kv_heads: int) -> Tensor:
    """Weight of keys: ``E[q q^T]`` over tokens, sequences and the query heads of a KV head.

    Args:
        query: float ``[batch, q_heads, tokens, head_dim]``, after the position embedding.
        kv_heads: a divisor of ``q_heads``.

    Returns:
        float32 ``[kv_heads, head_dim, head_dim]``.
    """
    rows = query.float().unflatten(1, (kv_heads, -1)).transpose(0, 1).flatten(1, 3)
    moment: Tensor = rows.mT @ rows / rows.shape[1]
    return moment


def output_moment(weight: Tensor, kv_heads: int, head_dim: int) -> Tensor:
    """Weight of values: ``sum(W_o^T W_o)`` over the query heads of a KV head.

    Args:
        weight: float ``[hidden_size, q_heads * head_dim]``, of the output projection.
        kv_heads: a divisor of ``q_heads``.
        head_dim: coordinates of a value.

    Returns:
        float32 ``[kv_heads, head_dim, head_dim]``.
    """
    by_head = weight.detach().float().unflatten(1, (kv_heads, -1, head_dim))
    return torch.einsum("ohgd,ohge->hde", by_head, by_head)


def shaped(codec: Codec, weight: Tensor, *, damping: float = DAMPING, sweeps: int = SWEEPS) -> ShapedCodec:
    """``codec`` with codes shaped by ``weight``.

    Args:
        codec: any codec with an unbiased scale (rule ``searched`` or ``unbiased``): with another, shaping trades a
            smaller spread of the error for a larger bias (measured, for values too).
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
    if codec.scale_rule not in ("searched", "unbiased"):
        raise ValueError(f"scale rule is {codec.scale_rule!r}; shaped codes need 'searched' or 'unbiased'")
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


def _with_feedback(unit: Tensor, feedback: Tensor, tables: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Nearest codes ``[d, heads, n]``, the error of each coordinate carried on to those behind it."""
    rest, codes = unit.clone(), []
    for i, (levels, boundaries) in enumerate(tables):
        code = torch.bucketize(rest[i], boundaries)
        error = (rest[i] - levels[code]) / feedback[:, i, i, None]
        rest[i + 1 :] -= error * feedback[:, i, i + 1 :].mT.unsqueeze(-1)
        codes.append(code)
    return torch.stack(codes)


def _coordinate_tables(codec: Codec) -> list[tuple[Tensor, Tensor]]:
    part_of = by_part(torch.arange(codec.layout.head_dim), codec.layout)
    return [table for part, table in zip(part_of, codec.tables, strict=True) for _ in part]


class _Search:
    """Coordinate descent on the weighted error, whose unbiased scale follows the codes.

    Args:
        unit: vectors of unit variance ``[d, heads, n]``.
        codes: where to start, of the same shape.
        weight: ``[heads, d, d]``.
        levels: of each coordinate.
    """

    def __init__(self, unit: Tensor, codes: Tensor, weight: Tensor, levels: list[Tensor]) -> None:
        self.unit, self.codes, self.weight, self.levels = unit, codes, weight, levels
        self.chosen = torch.stack([table[code] for table, code in zip(levels, codes, strict=True)])
        self.weighted_unit, self.weighted = (torch.einsum("hde,ehn->dhn", weight, x) for x in (unit, self.chosen))
        self.energy = unit.square().sum(0)
        # <u, l>, <u, W l> and <l, W l> of the present levels, [heads, n].
        self.inner = (unit * self.chosen).sum(0)
        self.weighted_inner = (self.weighted_unit * self.chosen).sum(0)
        self.weighted_power = (self.weighted * self.chosen).sum(0)

    def sweep(self) -> None:
        """Move each coordinate once, to itself or a neighbouring level."""
        for i in range(len(self.levels)):
            self._move(i)

    def _move(self, i: int) -> None:
        sums = [self.inner, self.weighted_inner, self.weighted_power]
        start, here, change = self.codes[i], self.chosen[i], torch.zeros_like(self.inner)
        code, least = start, self._error(*sums)
        for step in (-1, 1):
            candidate = (start + step).clamp(0, len(self.levels[i]) - 1)
            delta = self.levels[i][candidate] - here
            moved = self._moved(i, delta)
            error = self._error(*moved)
            better = error < least
            least = torch.where(better, error, least)
            code, change = torch.where(better, candidate, code), torch.where(better, delta, change)
            sums = [torch.where(better, new, old) for new, old in zip(moved, sums, strict=True)]
        self.inner, self.weighted_inner, self.weighted_power = sums
        self.codes[i] = code
        self.chosen[i] += change
        self.weighted += change * self.weight[:, i].mT.unsqueeze(-1)

    def _moved(self, i: int, delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The sums once level ``i`` has grown by ``delta``."""
        return (
            self.inner + delta * self.unit[i],
            self.weighted_inner + delta * self.weighted_unit[i],
            self.weighted_power + delta * (2 * self.weighted[i] + delta * self.weight[:, i, i, None]),
        )

    def _error(self, inner: Tensor, weighted_inner: Tensor, weighted_power: Tensor) -> Tensor:
        """``(u - s l)^T W (u - s l)`` less its constant term; infinite where no positive scale is unbiased."""
        scale = self.energy / inner
        error = scale * (scale * weighted_power - 2 * weighted_inner)
        return torch.where(inner > 0, error, torch.full_like(error, torch.inf))
