"""Trellis-coded vectors as one object, beside :class:`turboquant_core.TurboQuantMSE`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..codec import KEY_STREAM, check_center_shape
from ..compressed import Coding, CompressedTensor, center_digest, check_encoded
from ..integers import integer
from ..provider import Packed
from ..reference.vectors import check_vectors
from ..rotated import rotate_vectors
from ..rotation import check_seed, rotate, rotation_signs, unrotate
from ..scale import SCALE_RULES, ScaleRule, check_scale_rule
from .code import trellis_code
from .layout import TrellisLayout, pack_planes, unpack_planes
from .viterbi import nearest_sequence

TRELLIS_RULES = tuple(rule for rule in SCALE_RULES if rule != "searched")
"""A sequence is searched for by another criterion."""


class TurboQuantTrellis:
    """Vectors in 2 or 3 bits a coordinate, coded as sequences (experimental: bytes may change between releases).

    Keys of a model take ``stream=0`` and ``scale_rule="unbiased"``, values ``stream=1`` and ``"least_squares"``.

    Args:
        head_dim: coordinates of a vector, a multiple of 8 from 32 with a known Hadamard matrix.
        bits: 2 or 3.
        seed: rotation seed, in [0, 2**64).
        device: where vectors and tables live.
        scale_rule: see :mod:`turboquant_core.scale`; one of :data:`TRELLIS_RULES`.
        stream: rotation stream.
        center: float ``[kv_heads, head_dim]`` subtracted before the rotation, or None; see
            :class:`turboquant_core.Codec`.

    Raises:
        LayoutError: ``head_dim`` or ``bits`` is outside the format.
        ValueError: unknown scale rule, seed out of range, or ``center`` has another shape or is not finite.
    """

    def __init__(
        self,
        head_dim: int,
        bits: int,
        seed: int = 42,
        device: torch.device | str = "cpu",
        *,
        scale_rule: ScaleRule = "least_squares",
        stream: int = KEY_STREAM,
        center: Tensor | None = None,
    ) -> None:
        check_scale_rule(scale_rule, TRELLIS_RULES)
        check_center_shape(center, head_dim)
        self.layout = TrellisLayout(head_dim, bits)
        self.coding = Coding(self.layout, check_seed(seed), integer(stream, "stream", least=0), center_digest(center))
        self.scale_rule = scale_rule
        self.center = None if center is None else center.to(device=device, dtype=torch.float32)
        self._code = trellis_code(bits)
        self._signs = rotation_signs(head_dim, seed=seed, stream=stream, device=device)

    @property
    def head_dim(self) -> int:
        """Coordinates of a vector."""
        return self.layout.head_dim

    @property
    def device(self) -> torch.device:
        """Device of the tables."""
        return self._signs.device

    @property
    def bits(self) -> int:
        """Bits of a coordinate."""
        return self.layout.bits

    def encode(self, x: Tensor) -> CompressedTensor:
        """Pack float ``[..., head_dim]`` (``[..., kv_heads, head_dim]`` with a centre).

        A vector with a NaN or infinite coordinate gets codes 0, decodes to NaN and affects no other; a zero vector
        decodes to zeros.

        Raises:
            ValueError: wrong dtype, last dimension or device.
        """
        check_vectors(x, self, "x")
        vectors = rotate_vectors(x, self._signs, self.center)
        path, free = nearest_sequence(vectors.unit_variance().reshape(-1, self.head_dim), self._code)
        path, free = path.view(x.shape), free.view(x.shape)
        scales = vectors.stored_scale(self._levels(path, free), self.scale_rule)
        rows = pack_planes(path * vectors.finite, free * vectors.finite, self.layout)
        return CompressedTensor(Packed(rows, scales), self.coding, x.dtype)

    def decode(self, compressed: CompressedTensor) -> Tensor:
        """Reconstruct ``[..., head_dim]`` in the dtype that was encoded.

        Raises:
            ValueError: ``compressed`` was packed with another layout, seed, stream or centre.
        """
        x = unrotate(self._decode_rotated(compressed), self._signs)
        return (x if self.center is None else x + self.center).to(compressed.dtype)

    def scores(self, query: Tensor, keys: CompressedTensor, *, scaling: float) -> Tensor:
        """``scaling * Q K^T`` float32 ``[..., q_len, kv_len]`` without rotating a key back.

        With a centre, which no key has got back, a row differs from the plain scores by a constant.

        Raises:
            ValueError: wrong dtype, shape or device, or keys packed with another layout, seed, stream or centre.
        """
        check_vectors(query, self, "query")
        rotated = rotate(query.to(torch.float32), self._signs)
        return scaling * (rotated @ self._decode_rotated(keys).transpose(-1, -2))

    def _decode_rotated(self, compressed: CompressedTensor) -> Tensor:
        check_encoded(compressed, CompressedTensor)
        compressed.coding.check_reader(self.coding)
        path, free = unpack_planes(compressed.packed.codes, self.layout)
        return self._levels(path, free) * compressed.packed.scales.to(torch.float32).unsqueeze(-1)

    def _levels(self, path: Tensor, free: Tensor) -> Tensor:
        return self._code.levels(path.device)[free, self._code.subset_of(path)]
