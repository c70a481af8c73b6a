"""The kernels pass core's conformance suite: in the interpreter on a CPU, in both forms on a GPU."""

from __future__ import annotations

import pytest
import torch

from turboquant_core.testing import ProviderConformance
from turboquant_triton import TritonProvider

GPU = torch.cuda.is_available()
HEAD_DIMS = (64, 80, 96, 112, 128, 160, 192, 256)


class TestPortable(ProviderConformance):
    """Plain Triton; float16, since the interpreter multiplies bfloat16 as raw bits."""

    device = "cuda" if GPU else "cpu"
    dtype = torch.float16
    head_dims = HEAD_DIMS
    # The interpreter takes seconds where a GPU takes microseconds.
    bits = ProviderConformance.bits if GPU else ((4, 4), (3, 3), (2, 2), (4, None), (2.5, 3.5))
    page_sizes = (16, 64)
    group_sizes = (1, 4, 7, 40) if GPU else (1, 7)
    decode_tolerance = 1e-5
    attention_tolerance = 2e-3
    boundary_tolerance = 1e-4
    must_run = True

    @pytest.fixture
    def provider(self) -> TritonProvider:
        return TritonProvider(portable=True)


@pytest.mark.skipif(not GPU, reason="byte-permute instructions need an NVIDIA GPU")
@pytest.mark.gpu
class TestPermute(ProviderConformance):
    """Byte-permute and int8 tensor cores: the tolerance is that of int8 queries.

    Attention is by single warps at 128, 256 and, with 4 bits, 64, and in plain Triton at the others.
    """

    device = "cuda"
    dtype = torch.bfloat16
    head_dims = HEAD_DIMS
    page_sizes = (16, 32, 64, 128)
    group_sizes = (1, 4, 7, 16, 40)
    decode_tolerance = 1e-5
    attention_tolerance = 3e-2
    boundary_tolerance = 1e-4
    must_run = True

    @pytest.fixture
    def provider(self) -> TritonProvider:
        return TritonProvider()


@pytest.mark.skipif(not GPU, reason="byte-permute instructions need an NVIDIA GPU")
@pytest.mark.gpu
class TestPermuteHalf(TestPermute):
    dtype = torch.float16
    head_dims = (128,)
