"""The kernels pass core's conformance suite: in the interpreter on a CPU, in both forms on a GPU."""

from __future__ import annotations

import pytest
import torch

from turboquant_core import PageLayout
from turboquant_core.testing import ProviderConformance
from turboquant_triton import TritonProvider, attend
from turboquant_triton.attend import config_for
from turboquant_triton.support import single_warps_supported
from turboquant_triton.tuning import AttendConfig, warp_config

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
    """Byte-permute and int8 tensor cores: the tolerance is that of int8 queries."""

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


def single_warps_where_supported(layout: PageLayout, n: int, permute: bool) -> AttendConfig:
    """:func:`turboquant_triton.attend.config_for` that prefers the kernel of single warps."""
    if permute and single_warps_supported(layout, n):
        return warp_config(max(layout.key.head_dim, layout.value.head_dim), n)
    return config_for(layout, n, permute)


@pytest.mark.skipif(not GPU, reason="byte-permute instructions need an NVIDIA GPU")
@pytest.mark.gpu
class TestSingleWarps(TestPermute):
    """The kernel that no configuration chooses, which sweeps are about to time, where its operands are whole."""

    head_dims = (128, 256)
    page_sizes = (16, 128)
    group_sizes = (1, 4, 16)

    @pytest.fixture(autouse=True)
    def _chosen(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(attend, "config_for", single_warps_where_supported)
