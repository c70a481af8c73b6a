"""Facts and constants of a device, looked up once."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from turboquant_core.rotation import rotation_matrix

_INTERPRETED_MULTIPROCESSORS = 2
_INTERPRETED_SHARED_MEMORY = 227 << 10
# Devices of ROCm do not say.
_LEAST_SHARED_MEMORY = 64 << 10


def indexed(device: torch.device) -> torch.device:
    """The device as its tensors name it: ``cuda`` stands for the current GPU."""
    return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device


@lru_cache(maxsize=64)
def hadamard_int8(head_dim: int, device: torch.device) -> Tensor:
    """The Hadamard matrix of core's rotation, int8 ``[head_dim, head_dim]`` of +-1.

    Made at the first call: make that call before capturing a CUDA graph.
    """
    unit = rotation_matrix(torch.ones(head_dim))
    return unit.sign().to(device=device, dtype=torch.int8)


@lru_cache(maxsize=64)
def hadamard_fp16(head_dim: int, device: torch.device, transpose: bool) -> Tensor:
    """The same matrix or its transpose in fp16, which a kernel widens faster than integers."""
    matrix = hadamard_int8(head_dim, device)
    return (matrix.T if transpose else matrix).to(torch.float16).contiguous()


@lru_cache(maxsize=16)
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; a small number in the interpreter, where programs run one after the other."""
    if device.type == "cpu":
        return _INTERPRETED_MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@lru_cache(maxsize=16)
def has_dependent_launch(device: torch.device) -> bool:
    """Whether a kernel may start while the one before it ends (programmatic dependent launch, sm_90 and newer)."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


@lru_cache(maxsize=16)
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may take."""
    if device.type == "cpu":
        return _INTERPRETED_SHARED_MEMORY
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", _LEAST_SHARED_MEMORY))
