"""A kernel provider of a third party: the reference, with a ``decode`` of its own."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from turboquant_core import Codec, Packed, ReferenceProvider, unpack_codes, unrotate


class ExampleProvider(ReferenceProvider):
    """Replaces one operation and inherits five. Ahead of the reference, behind any compiled kernel."""

    name: ClassVar[str] = "example"
    priority: ClassVar[int] = 50

    def decode(self, packed: Packed, codec: Codec, dtype: torch.dtype = torch.float32) -> Tensor:
        """See :meth:`turboquant_core.KernelProvider.decode`."""
        level = codec.levels_of(unpack_codes(packed.codes, codec.layout))
        x = unrotate(level * packed.scales.float().unsqueeze(-1), codec.signs)
        if codec.center is not None:
            x = x + codec.center
        return x.to(dtype)
