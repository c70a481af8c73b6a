"""The paper's fractional bits: outlier channels in more bits than the others, for research and for tables.

arXiv 2504.19874, section 4.3: two independent quantizers, one over the channels with the most energy and one over the
rest. Which channels those are is decided once, from calibration vectors, and is no part of what is stored per vector.
The packed format splits the *rotated* coordinates instead (:class:`turboquant_core.VectorLayout` with 2.5 or 3.5 bits):
no calibration, one rotation, one scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .arguments import check_integers, check_tensors
from .compressed import CompressedTensor, check_encoded, compression_ratio
from .quantizer import TurboQuantMSE
from .scale import ScaleRule

OUTLIER_FRACTION = 0.25
"""The paper's 32 of 128 channels."""


def outlier_channels(calibration: Tensor, count: int) -> Tensor:
    """The ``count`` channels of ``calibration`` float ``[..., head_dim]`` with the most energy: int64, ascending.

    Raises:
        ValueError: ``count`` is not in [1, head_dim), or no vector is given, or one is not finite.
    """
    head_dim = calibration.shape[-1]
    if not 1 <= count < head_dim:
        raise ValueError(f"{count} outlier channels of {head_dim}: choose at least 1, and leave at least one")
    if not calibration.numel() or not bool(calibration.isfinite().all()):
        raise ValueError("calibration vectors must be finite, and there must be at least one")
    energy = calibration.double().square().flatten(0, -2).mean(0)
    return energy.topk(count).indices.sort().values


@dataclass(frozen=True, slots=True)
class SplitTensor:
    """Vectors compressed by :class:`TurboQuantOutliers`.

    Attributes:
        outliers: the outlier channels.
        others: the rest.
        channels: which channels are outliers, in the order of their coordinates.
    """

    outliers: CompressedTensor
    others: CompressedTensor
    channels: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """True bytes: codes and both scales of each vector."""
        return self.outliers.nbytes + self.others.nbytes

    @property
    def bits_per_coordinate(self) -> float:
        """True bits of a coordinate, scales included."""
        return 8 * self.nbytes / (self.outliers.shape.numel() + self.others.shape.numel())

    @property
    def shape(self) -> torch.Size:
        """Shape of the tensor that was encoded: ``[..., head_dim]``."""
        *lead, outliers = self.outliers.shape
        return torch.Size((*lead, outliers + self.others.shape[-1]))

    @property
    def compression_ratio(self) -> float:
        """Bytes of the encoded tensor in its own dtype over the true bytes stored; 1.0 for no vectors."""
        return compression_ratio(self.shape, self.outliers.dtype, self.nbytes)


class TurboQuantOutliers:
    """Outlier channels at one width, the others at another, each rotated and scaled by itself.

    Args:
        channels: int ``[n]``, the outlier channels (:func:`outlier_channels`); ``n`` and ``head_dim - n`` are multiples
            of 8 with known Hadamard matrices.
        head_dim: coordinates of a vector.
        bits: (outliers, others); (3, 2) is what the paper calls 2.5 bits, (4, 3) what reproductions call 3.5.
        seed: rotation seed, in [0, 2**64).
        device: where vectors and tables live.
        scale_rule: see :mod:`turboquant_core.scale`.

    Raises:
        LayoutError: a part has a size or a width outside the format.
        ValueError: ``channels`` are not distinct channels of a vector; unknown scale rule; seed out of range.
    """

    def __init__(
        self,
        channels: Tensor,
        head_dim: int,
        bits: tuple[int, int] = (3, 2),
        seed: int = 42,
        device: torch.device | str = "cpu",
        *,
        scale_rule: ScaleRule = "least_squares",
    ) -> None:
        check_tensors(channels=channels)
        check_integers(channels=channels)
        self._chosen = tuple(channels.tolist())
        chosen = set(self._chosen)
        if len(chosen) != channels.numel() or not chosen <= set(range(head_dim)):
            raise ValueError(f"channels are {channels.tolist()}; they must be distinct and below head_dim = {head_dim}")
        rest = torch.tensor([channel for channel in range(head_dim) if channel not in chosen], dtype=torch.int64)
        self.head_dim = head_dim
        self.channels, self.others = channels.to(device), rest.to(device)
        self._parts = tuple(
            TurboQuantMSE(index.numel(), width, seed, device, scale_rule=scale_rule)
            for index, width in zip((channels, rest), bits, strict=True)
        )

    @property
    def vector_bytes(self) -> int:
        """True bytes of one vector: codes and both scales."""
        return sum(part.codec.layout.nbytes for part in self._parts)

    def encode(self, x: Tensor) -> SplitTensor:
        """Pack float ``[..., head_dim]``.

        Raises:
            ValueError: wrong dtype, last dimension or device.
        """
        if x.dim() == 0 or x.shape[-1] != self.head_dim:
            raise ValueError(f"x has shape {tuple(x.shape)}; the last dimension must be head_dim = {self.head_dim}")
        outliers, others = self._parts
        return SplitTensor(outliers.encode(x[..., self.channels]), others.encode(x[..., self.others]), self._chosen)

    def decode(self, packed: SplitTensor) -> Tensor:
        """Reconstruct ``[..., head_dim]`` in the dtype that was encoded.

        Raises:
            ValueError: ``packed`` was packed with other channels, another layout or seed.
        """
        check_encoded(packed, SplitTensor)
        if packed.channels != self._chosen:
            raise ValueError(
                f"these vectors were packed with the outlier channels {packed.channels}, this quantizer reads "
                f"{self._chosen}: decode with the quantizer that packed them"
            )
        outliers, others = self._parts[0].decode(packed.outliers), self._parts[1].decode(packed.others)
        x = outliers.new_empty((*outliers.shape[:-1], self.head_dim))
        x[..., self.channels], x[..., self.others] = outliers, others
        return x
