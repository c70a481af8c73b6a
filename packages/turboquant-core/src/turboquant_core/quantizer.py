"""The paper's Algorithm 1 as one object: vectors in, packed vectors out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .codec import KEY_STREAM, Codec
from .layout import Form, RowLayout, VectorLayout
from .provider import Packed
from .reference import ReferenceProvider
from .scale import ScaleRule


@dataclass(frozen=True, slots=True)
class CompressedTensor:
    """Packed vectors with what it takes to read them.

    Attributes:
        packed: codes uint8 ``[..., code_bytes]`` and scales fp16 ``[...]``.
        layout: where the bits lie.
        dtype: dtype of the tensor that was encoded.
    """

    packed: Packed
    layout: RowLayout
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        """Shape of the tensor that was encoded: ``[..., head_dim]``."""
        return torch.Size((*self.packed.scales.shape, self.layout.head_dim))

    @property
    def nbytes(self) -> int:
        """True bytes stored: codes and scales."""
        return self.packed.nbytes

    @property
    def compression_ratio(self) -> float:
        """Bytes of the encoded tensor in its own dtype over the true bytes stored; 1.0 for no vectors."""
        return self.shape.numel() * self.dtype.itemsize / self.nbytes if self.nbytes else 1.0


class TurboQuantMSE:
    """TurboQuant optimised for reconstruction (arXiv 2504.19874, Algorithm 1), in the packed format.

    Args:
        head_dim: coordinates of a vector, a multiple of 8 with a known Hadamard matrix.
        bits: 2, 3 or 4; 2.5 or 3.5 where ``head_dim`` is a multiple of 16.
        seed: rotation seed, in [0, 2**64).
        device: where vectors and tables live.
        scale_rule: see :mod:`turboquant_core.scale`.
        form: codebook form of the packed format.

    Raises:
        LayoutError: ``head_dim`` or ``bits`` is outside the format.
        ValueError: unknown scale rule or seed out of range.
    """

    def __init__(
        self,
        head_dim: int,
        bits: float,
        seed: int = 42,
        device: torch.device | str = "cpu",
        *,
        scale_rule: ScaleRule = "least_squares",
        form: Form = "int8",
    ) -> None:
        layout = VectorLayout(head_dim, bits, form)
        self.codec = Codec.create(layout, seed=seed, stream=KEY_STREAM, scale_rule=scale_rule, device=device)
        self._operations = ReferenceProvider()

    @property
    def head_dim(self) -> int:
        """Coordinates of a vector."""
        return self.codec.layout.head_dim

    @property
    def bits(self) -> float:
        """Bits of a coordinate."""
        return self.codec.layout.bits

    def encode(self, x: Tensor) -> CompressedTensor:
        """Pack float ``[..., head_dim]``.

        A vector with a NaN or infinite coordinate decodes to NaN and affects no other; a zero vector decodes to zeros.

        Raises:
            ValueError: wrong dtype, last dimension or device.
        """
        return CompressedTensor(self._operations.encode(x, self.codec), self.codec.layout, x.dtype)

    def decode(self, compressed: CompressedTensor) -> Tensor:
        """Reconstruct ``[..., head_dim]`` in the dtype that was encoded.

        Raises:
            ValueError: ``compressed`` has another layout than this quantizer.
        """
        if compressed.layout != self.codec.layout:
            raise ValueError(
                f"these vectors were packed as {compressed.layout}, this quantizer reads {self.codec.layout}"
            )
        return self._operations.decode(compressed.packed, self.codec, compressed.dtype)
