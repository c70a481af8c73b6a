"""The names that others build on, and what importing them costs."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

import turboquant_core

PUBLIC = """
Attended CacheCodec Codebook Codec Coding CompressedTensor Gathered KernelProvider KernelRequest LAYOUT_VERSION
LayoutError MemoryFigures Packed PackedPast PackedSequences PageLayout ProdTensor ProviderError RawLayout
ReferenceProvider SplitTensor TurboQuantError TurboQuantKVCache TurboQuantMSE TurboQuantOutliers TurboQuantProd
VectorLayout WindowedPast WindowedSequences Windows __version__ attend_dense available_providers format_codebook
lloyd_max load_provider merge_attended outlier_channels pack_codes rotate rotation_signs select_provider unpack_codes
unrotate
"""


def test_names() -> None:
    assert sorted(turboquant_core.__all__) == sorted(PUBLIC.split())
    assert all(hasattr(turboquant_core, name) for name in turboquant_core.__all__)
    assert turboquant_core.__version__ == version("turboquant-core")


def test_every_public_object_is_documented() -> None:
    for name in turboquant_core.__all__:
        value = getattr(turboquant_core, name)
        if not isinstance(value, int | str):
            assert value.__doc__, name


def test_importing_loads_neither_kernels_nor_test_tools() -> None:
    forbidden = "triton transformers vllm pytest hypothesis turboquant_triton turboquant_hf turboquant_vllm"
    program = f"import sys, turboquant_core; print([m for m in {forbidden.split()!r} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "[]"
