"""Other libraries' codecs, from their published formats, or the libraries themselves where they are installed."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from typing import Any

import torch
from scoring import Method, VectorCodec
from torch import Tensor

from turboquant_core import lloyd_max, rotate, rotation_signs, unrotate

GROUP = 64
"""Coordinates that share a scale and a zero in hqq and quanto, as in Transformers' quantized caches."""
FP16_BYTES = 2


def as_fp16(x: Tensor) -> Tensor:
    """Rounded to what is stored."""
    return x.to(torch.float16).to(torch.float32)


@dataclass(frozen=True)
class Textbook:
    """Rotation, Lloyd-Max levels of the exact coordinate density, fp16 norm.

    fused-turboquant keeps the norm as the scale; vLLM's ``_nc`` keys make the estimate have the norm when they are read
    (``renormalise``) and take the levels of N(0, 1).
    """

    bits: int
    seed: int
    renormalise: bool = False

    def __call__(self, x: Tensor, layer: int) -> Tensor:
        head_dim = x.shape[-1]
        levels, boundaries = lloyd_max(self.bits, None if self.renormalise else head_dim).tensors(x.device)
        signs = rotation_signs(head_dim, seed=self.seed, device=x.device)
        norm = x.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float16).tiny)
        unit = rotate(x / norm, signs) * math.sqrt(head_dim)
        found = levels[torch.bucketize(unit.contiguous(), boundaries)]
        size = found.norm(dim=-1, keepdim=True) if self.renormalise else math.sqrt(head_dim)
        return unrotate(found / size * as_fp16(norm), signs)

    def vector_bytes(self, head_dim: int, layer: int) -> float:
        return head_dim * self.bits / 8 + FP16_BYTES


@dataclass(frozen=True)
class MinMax:
    """Uniform levels between the least and the largest coordinate of a vector.

    vLLM's values: not rotated, scale and zero in fp16. vLLM's ``int4_per_token_head``: rotated, an fp16 scale with an
    integer zero of 4 bits in its mantissa (``packed_zero``).
    """

    bits: int
    seed: int | None = None
    packed_zero: bool = False

    def __call__(self, x: Tensor, layer: int) -> Tensor:
        signs = None if self.seed is None else rotation_signs(x.shape[-1], seed=self.seed, device=x.device)
        z = x if signs is None else rotate(x, signs)
        top, low = (1 << self.bits) - 1, z.amin(-1, keepdim=True)
        scale = as_fp16((z.amax(-1, keepdim=True) - low) / top).clamp_min(torch.finfo(torch.float16).tiny)
        if self.packed_zero:
            zero = (-low / scale).round().clamp(0, top)
            found = ((z / scale + zero).round().clamp(0, top) - zero) * scale
        else:
            low = as_fp16(low)
            found = ((z - low) / scale).round().clamp(0, top) * scale + low
        return found if signs is None else unrotate(found, signs)

    def vector_bytes(self, head_dim: int, layer: int) -> float:
        return head_dim * self.bits / 8 + (FP16_BYTES if self.packed_zero else 2 * FP16_BYTES)


@dataclass(frozen=True)
class Hqq:
    """hqq's quantizer, groups within a token as its cache in Transformers makes them.

    On the CPU, as quanto: the numbers are the same, and their CUDA extensions are compiled when first used.
    """

    bits: int

    def __call__(self, x: Tensor, layer: int) -> Tensor:
        from hqq.core.quantize import Quantizer

        rows = x.reshape(-1, x.shape[-1]).cpu()
        codes, meta = Quantizer.quantize(
            rows, nbits=self.bits, axis=1, group_size=GROUP, device="cpu", compute_dtype=torch.float32
        )
        return Quantizer.dequantize(codes, meta).view(x.shape).to(x.device)

    def vector_bytes(self, head_dim: int, layer: int) -> float:
        return _grouped_bytes(head_dim, self.bits)


@dataclass(frozen=True)
class Quanto:
    """quanto's quantizer, groups within a token."""

    bits: int

    def __call__(self, x: Tensor, layer: int) -> Tensor:
        from optimum.quanto import MaxOptimizer, qint2, qint4, quantize_weight

        kind: Any = {2: qint2, 4: qint4}[self.bits]
        rows = x.reshape(-1, GROUP).cpu()
        scale, shift = MaxOptimizer()(rows, kind, 0, GROUP)
        return quantize_weight(rows, kind, 0, scale, shift, GROUP).dequantize().view(x.shape).to(x.device)

    def vector_bytes(self, head_dim: int, layer: int) -> float:
        return _grouped_bytes(head_dim, self.bits)


def _grouped_bytes(head_dim: int, bits: int) -> float:
    return head_dim * bits / 8 + head_dim / GROUP * 2 * FP16_BYTES


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def rivals(seed: int) -> tuple[list[Method], list[str]]:
    """Every rival at every width that it has, and the names of those that are not installed."""

    def both(name: str, bits: int, codec: VectorCodec) -> Method:
        return Method(f"{name}, {bits} bit", codec, codec, name)

    found = [both("fused-turboquant", bits, Textbook(bits, seed)) for bits in (4, 3, 2)]
    nc = "vLLM turboquant _nc"
    found += [Method(f"{nc}, {b} bit", Textbook(b, seed, True), MinMax(b), nc) for b in (4, 3, 2)]
    found.append(both("vLLM int4_per_token_head", 4, MinMax(4, seed, True)))
    absent = []
    for name, module, codec, widths in (("hqq", "hqq", Hqq, (4, 3, 2)), ("quanto", "optimum.quanto", Quanto, (4, 2))):
        if _installed(module):
            found += [both(name, bits, codec(bits)) for bits in widths]
        else:
            absent.append(name)
    return found, absent
