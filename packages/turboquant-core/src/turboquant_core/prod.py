"""TurboQuant for inner products: the paper's Algorithm 2, for research and for tables.

An MSE stage with ``bits - 1`` bits leaves a residual ``r``; one more bit a coordinate, ``sign(S r)`` with a Gaussian
matrix ``S`` (quantized Johnson-Lindenstrauss), and the norm of ``r`` make the estimate of every inner product unbiased
(arXiv 2504.19874, Algorithm 2 and Theorem 2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .arguments import check_device, check_tensors
from .bits import pack_bits, unpack_bits
from .codebook import lloyd_max
from .compressed import check_encoded, compression_ratio
from .gaussian import normal_numbers
from .integers import integer, integer_of
from .rotated import power_of_two
from .rotation import check_seed, rotate, rotation_signs, unrotate

PROD_BITS = (1, 2, 3, 4)


def gaussian_projection(head_dim: int, seed: int) -> Tensor:
    """The matrix ``S`` of independent N(0, 1) entries (Algorithm 2): float32 ``[head_dim, head_dim]``, row-major from
    :func:`turboquant_core.gaussian.normal_numbers`.
    """
    normal = normal_numbers(head_dim * head_dim, seed)
    return torch.from_numpy(normal.reshape(head_dim, head_dim).astype(np.float32))


@dataclass(frozen=True, slots=True)
class ProdTensor:
    """Vectors compressed by :class:`TurboQuantProd`.

    Attributes:
        codes: uint8 ``[..., (bits - 1) * head_dim / 8]``, bit planes of the MSE codes, least significant first.
        signs: uint8 ``[..., head_dim / 8]``, ``S r > 0``.
        norm: float32 ``[...]``, norm of the vector.
        residual: float32 ``[...]``, norm of the residual of the normalised vector.
        seed: of the rotation and of the Gaussian matrix.
        dtype: dtype of the tensor that was encoded.
    """

    codes: Tensor
    signs: Tensor
    norm: Tensor
    residual: Tensor
    seed: int
    dtype: torch.dtype

    @property
    def head_dim(self) -> int:
        """Coordinates of a vector."""
        return 8 * self.signs.shape[-1]

    @property
    def bits(self) -> int:
        """Bits of a coordinate, that of the residual's sign included."""
        return 1 + self.codes.shape[-1] // self.signs.shape[-1]

    @property
    def shape(self) -> torch.Size:
        """Shape of the tensor that was encoded: ``[..., head_dim]``."""
        return torch.Size((*self.norm.shape, self.head_dim))

    @property
    def nbytes(self) -> int:
        """True bytes: codes, signs and both norms."""
        return self.codes.nbytes + self.signs.nbytes + self.norm.nbytes + self.residual.nbytes

    @property
    def compression_ratio(self) -> float:
        """Bytes of the encoded tensor in its own dtype over the true bytes stored; 1.0 for no vectors."""
        return compression_ratio(self.shape, self.dtype, self.nbytes)


class TurboQuantProd:
    """Unbiased inner products from ``bits`` bits a coordinate.

    Args:
        head_dim: coordinates of a vector, a multiple of 8 with a known Hadamard matrix.
        bits: 1 to 4; one of them is the residual's sign.
        seed: of the rotation and of the Gaussian matrix, in [0, 2**64).
        device: where the tensors live.

    Raises:
        LayoutError: no Hadamard matrix of order ``head_dim`` is known.
        ValueError: ``bits`` is outside 1 to 4, ``head_dim`` no multiple of 8, or ``seed`` out of range.
    """

    def __init__(self, head_dim: int, bits: int, seed: int = 42, device: torch.device | str = "cpu") -> None:
        bits = integer_of(bits, "bits", PROD_BITS, what="Algorithm 2 is implemented for")
        head_dim, seed = integer(head_dim, "head_dim"), check_seed(seed)
        if head_dim % 8:
            raise ValueError(f"head_dim is {head_dim}; it must be a multiple of 8")
        self.head_dim, self.bits, self.seed = head_dim, bits, seed
        self._rotation = rotation_signs(head_dim, seed=seed, device=device)
        self._projection = gaussian_projection(head_dim, seed).to(device)
        levels, boundaries = (torch.zeros(1), torch.zeros(0))
        if bits > 1:
            levels, boundaries = lloyd_max(bits - 1, head_dim).tensors(device)
        self._levels, self._boundaries = levels.to(device), boundaries.to(device)

    def encode(self, x: Tensor) -> ProdTensor:
        """Compress float ``[..., head_dim]``.

        A zero vector decodes to zeros; one with a NaN or infinite coordinate decodes to NaN and affects no other. The
        arithmetic is float32: a float64 coordinate beyond its range counts as infinite.

        Raises:
            ValueError: ``x`` is not floating-point, has another last dimension or is on another device.
        """
        self._check(x, "x")
        dtype, x = x.dtype, x.to(torch.float32)
        factor = power_of_two(x)
        x = x / factor
        norm = x.norm(dim=-1)
        unit = x / torch.where(norm > 0, norm, torch.ones_like(norm)).unsqueeze(-1)
        codes = torch.bucketize(
            (rotate(unit, self._rotation) * math.sqrt(self.head_dim)).contiguous(), self._boundaries
        )
        residual = unit - self._stage_one(codes)
        planes = torch.cat([(codes >> plane) & 1 for plane in range(self.bits - 1)] or [codes[..., :0]], dim=-1)
        return ProdTensor(
            codes=pack_bits(planes == 1),
            signs=pack_bits(residual @ self._projection.T > 0),
            norm=norm * factor.squeeze(-1),
            residual=residual.norm(dim=-1),
            seed=self.seed,
            dtype=dtype,
        )

    def decode(self, packed: ProdTensor) -> Tensor:
        """The float32 vectors ``[..., head_dim]`` whose inner products are the unbiased estimates.

        Raises:
            ValueError: ``packed`` has another ``head_dim``, ``bits`` or ``seed``, or is on another device.
        """
        stage_one = self._stage_one(self._codes(packed))
        correction = self._residual_scale(packed).unsqueeze(-1) * (self._residual_signs(packed) @ self._projection)
        return packed.norm.unsqueeze(-1) * (stage_one + correction)

    def inner_product(self, query: Tensor, packed: ProdTensor) -> Tensor:
        """Unbiased estimate of ``<query, x>``: float32 ``[..., queries, vectors]``.

        Rotates and projects each query once, so that no vector is rotated back:
        ``<q, x_mse> + sqrt(pi / 2) / d * |r| * <S q, sign(S r)>`` (Algorithm 2).

        Args:
            query: float ``[..., queries, head_dim]``.
            packed: vectors ``[..., vectors]``.

        Raises:
            ValueError: ``query`` is not floating-point or has another last dimension; ``packed`` has another
                ``head_dim``, ``bits`` or ``seed``; one of them is on another device.
        """
        self._check(query, "query")
        query = query.to(torch.float32)
        levels = self._levels[self._codes(packed)] / math.sqrt(self.head_dim)
        stage_one = rotate(query, self._rotation) @ levels.transpose(-1, -2)
        correction = (query @ self._projection.T) @ self._residual_signs(packed).transpose(-1, -2)
        return packed.norm.unsqueeze(-2) * (stage_one + self._residual_scale(packed).unsqueeze(-2) * correction)

    def _codes(self, packed: ProdTensor) -> Tensor:
        """int64 ``[..., head_dim]``."""
        check_encoded(packed, ProdTensor)
        made, read = ((x.head_dim, x.bits, x.seed) for x in (packed, self))
        if made != read:
            raise ValueError(
                "these vectors were packed with head_dim {}, {} bits and seed {}; this quantizer has head_dim {}, {} "
                "bits and seed {}: decode with the quantizer that packed them".format(*made, *read)
            )
        check_device(self._rotation.device, "the quantizer", codes=packed.codes, signs=packed.signs, norm=packed.norm)
        planes = unpack_bits(packed.codes).unflatten(-1, (self.bits - 1, self.head_dim)).long()
        shifts = torch.arange(self.bits - 1, device=planes.device).unsqueeze(-1)
        codes: Tensor = (planes << shifts).sum(-2)
        return codes

    def _residual_scale(self, packed: ProdTensor) -> Tensor:
        return packed.residual * (math.sqrt(math.pi / 2) / self.head_dim)

    @staticmethod
    def _residual_signs(packed: ProdTensor) -> Tensor:
        """+-1, float32 ``[..., head_dim]``."""
        return unpack_bits(packed.signs).to(torch.float32) * 2 - 1

    def _stage_one(self, codes: Tensor) -> Tensor:
        return unrotate(self._levels[codes] / math.sqrt(self.head_dim), self._rotation)

    def _check(self, x: Tensor, name: str) -> None:
        check_tensors(**{name: x})
        if not x.is_floating_point() or x.dim() == 0 or x.shape[-1] != self.head_dim:
            raise ValueError(
                f"{name} is {x.dtype} {tuple(x.shape)}; it must be floating-point with last dimension {self.head_dim}"
            )
        check_device(self._rotation.device, "the quantizer", **{name: x})
