"""The randomized Hadamard rotation ``z = H diag(signs) x / sqrt(d)``, orthonormal, in O(d log d).

``H`` is ``kron(base, sylvester)``: entry ``H[i, j] = base[i // n, j // n] * (-1) ** popcount((i % n) & (j % n))`` with
``n`` the power-of-two factor and ``base`` the matrix of the remaining order (:mod:`turboquant_core.hadamard`).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .errors import LayoutError
from .hadamard import factor, hadamard_matrix
from .integers import integer

_MASK = (1 << 64) - 1


def _splitmix64(state: int) -> int:
    z = state
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def check_seed(seed: object) -> int:
    """``seed`` as an int.

    Raises:
        ValueError: it is no integer in [0, 2**64).
    """
    return integer(seed, "seed", least=0, most=_MASK)


def rotation_signs(head_dim: int, seed: int = 42, stream: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """Signs of the rotation from a written integer recurrence, the same in every release.

    The state starts at ``(splitmix(seed) + stream) mod 2**64``, where ``splitmix`` is the output function of
    SplitMix64; before coordinate ``i`` it grows by ``0x9E3779B97F4A7C15``. The sign is -1 where the top bit of the
    output is set.

    Args:
        head_dim: number of signs.
        seed: in [0, 2**64).
        stream: 0 for keys, 1 for values.
        device: where the tensor lives.

    Returns:
        float32 ``[head_dim]`` of +-1.

    Raises:
        ValueError: ``seed`` or ``stream`` is out of range.
        LayoutError: no Hadamard matrix of order ``head_dim`` is known.
    """
    seed, stream = check_seed(seed), integer(stream, "stream", least=0)
    head_dim = integer(head_dim, "head_dim", error=LayoutError)
    factor(head_dim)
    state = (_splitmix64(seed) + stream) & _MASK
    signs = []
    for _ in range(head_dim):
        state = (state + 0x9E3779B97F4A7C15) & _MASK
        signs.append(-1.0 if _splitmix64(state) >> 63 else 1.0)
    return torch.tensor(signs, dtype=torch.float32, device=device)


def _as_float(x: Tensor, signs: Tensor) -> Tensor:
    if not x.is_floating_point():
        raise ValueError(f"the tensor to rotate is {x.dtype}; it must be floating-point")
    if x.dim() == 0 or x.shape[-1] != signs.shape[0]:
        raise ValueError(
            f"the tensor to rotate has shape {tuple(x.shape)}; its last dimension must be {signs.shape[0]}"
        )
    return x if x.dtype == torch.float64 else x.to(torch.float32)


def _walsh_hadamard(x: Tensor) -> Tensor:
    """Unnormalised fast transform of the last dimension, a power of two."""
    order, half = x.shape[-1], 1
    shape = x.shape
    while half < order:
        pairs = x.reshape(*shape[:-1], order // (2 * half), 2, half)
        low, high = pairs[..., 0, :], pairs[..., 1, :]
        x = torch.stack((low + high, low - high), dim=-2).reshape(shape)
        half *= 2
    return x


@lru_cache(maxsize=64)
def _base_matrix(order: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(hadamard_matrix(order).copy()).to(device=device, dtype=dtype)


def _transform(x: Tensor, transpose: bool) -> Tensor:
    order, power = factor(x.shape[-1])
    blocks = _walsh_hadamard(x.reshape(*x.shape[:-1], order, power))
    if order == 1:
        return blocks.flatten(-2)
    base = _base_matrix(order, x.device, x.dtype)
    return torch.einsum("ij,...jn->...in", base.T if transpose else base, blocks).flatten(-2)


def _unit(head_dim: int) -> float:
    return float(head_dim**-0.5)


def rotate(x: Tensor, signs: Tensor) -> Tensor:
    """Rotate the last dimension: ``z = H diag(signs) x / sqrt(d)``.

    Args:
        x: float ``[..., d]``.
        signs: float32 ``[d]`` of +-1.

    Returns:
        float32 ``[..., d]`` (float64 for float64 input), of the same norm.

    Raises:
        ValueError: not floating-point, or the last dimension is not ``d``.
    """
    x = _as_float(x, signs)
    return _transform(x * signs.to(x.dtype), transpose=False) * _unit(x.shape[-1])


def unrotate(z: Tensor, signs: Tensor) -> Tensor:
    """Inverse of :func:`rotate`: ``x = diag(signs) H^T z / sqrt(d)``; same shapes, dtypes and errors."""
    z = _as_float(z, signs)
    return _transform(z, transpose=True) * signs.to(z.dtype) * _unit(z.shape[-1])


def rotation_matrix(signs: Tensor) -> Tensor:
    """The dense matrix ``M`` with ``rotate(x) = M x``: float32 ``[d, d]``, orthonormal."""
    return rotate(torch.eye(signs.shape[0], device=signs.device), signs).T.contiguous()
