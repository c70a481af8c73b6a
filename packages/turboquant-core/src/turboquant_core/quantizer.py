"""The paper's Algorithm 1 as one object: vectors in, packed vectors out."""

from __future__ import annotations

import torch
from torch import Tensor

from .codec import KEY_STREAM, Codec
from .compressed import Coding, CompressedTensor, check_encoded
from .layout import Form, VectorLayout
from .reference import ReferenceProvider
from .rotation import check_seed
from .scale import ScaleRule


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
        self.coding = Coding(layout, check_seed(seed), KEY_STREAM)
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

        The arithmetic is float32: a float64 coordinate beyond its range counts as infinite. The stored scale, fp16, is
        about the root mean square of the coordinates. From 6.1e-5 to 65504 it keeps 11 bits. Below, it is a multiple of
        6e-8: small vectors come back with a coarser length, and those under 3e-8 as zeros. Above 65504 it saturates:
        the vector keeps its direction and comes back finite and too short. Multiply vectors of such sizes by a power of
        two before, and divide by it after.

        Raises:
            ValueError: no tensor, wrong dtype, last dimension or device.
        """
        return CompressedTensor(self._operations.encode(x, self.codec), self.coding, x.dtype)

    def decode(self, compressed: CompressedTensor) -> Tensor:
        """Reconstruct ``[..., head_dim]`` in the dtype that was encoded.

        Raises:
            ValueError: ``compressed`` is none, or was packed with another layout, form or seed.
        """
        check_encoded(compressed, CompressedTensor)
        compressed.coding.check_reader(self.coding)
        return self._operations.decode(compressed.packed, self.codec, compressed.dtype)
