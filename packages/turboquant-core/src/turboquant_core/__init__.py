"""TurboQuant (arXiv 2504.19874): vectors in 2 to 4 bits per coordinate, and attention over the packed bytes.

A randomized Hadamard rotation makes the coordinates of a vector near-Gaussian, a Lloyd-Max codebook quantizes each,
the codes are packed, and one scale per vector is kept. This package holds the mathematics, the packed layout, the
PyTorch reference of every operation, and the protocol through which faster kernels are found.

Start with :class:`TurboQuantMSE` (vectors), :class:`TurboQuantKVCache` (a cache) or :func:`select_provider` (kernels).
"""

from __future__ import annotations

from ._version import __version__
from .codebook import Codebook, format_codebook, lloyd_max
from .codec import CacheCodec, Codec
from .compressed import Coding, CompressedTensor
from .dense import attend_dense
from .errors import LayoutError, ProviderError, TurboQuantError
from .kv_cache import TurboQuantKVCache
from .layout import LAYOUT_VERSION, PageLayout, RawLayout, VectorLayout
from .merge import merge_attended
from .outliers import SplitTensor, TurboQuantOutliers, outlier_channels
from .packed_sequences import MemoryFigures, PackedPast, PackedSequences
from .packing import pack_codes, unpack_codes
from .prod import ProdTensor, TurboQuantProd
from .provider import Attended, Gathered, KernelProvider, KernelRequest, Packed
from .quantizer import TurboQuantMSE
from .reference import ReferenceProvider
from .rotation import rotate, rotation_signs, unrotate
from .selection import available_providers, load_provider, select_provider
from .windows import WindowedPast, WindowedSequences, Windows

__all__ = [
    "LAYOUT_VERSION",
    "Attended",
    "CacheCodec",
    "Codebook",
    "Codec",
    "Coding",
    "CompressedTensor",
    "Gathered",
    "KernelProvider",
    "KernelRequest",
    "LayoutError",
    "MemoryFigures",
    "Packed",
    "PackedPast",
    "PackedSequences",
    "PageLayout",
    "ProdTensor",
    "ProviderError",
    "RawLayout",
    "ReferenceProvider",
    "SplitTensor",
    "TurboQuantError",
    "TurboQuantKVCache",
    "TurboQuantMSE",
    "TurboQuantOutliers",
    "TurboQuantProd",
    "VectorLayout",
    "WindowedPast",
    "WindowedSequences",
    "Windows",
    "__version__",
    "attend_dense",
    "available_providers",
    "format_codebook",
    "lloyd_max",
    "load_provider",
    "merge_attended",
    "outlier_channels",
    "pack_codes",
    "rotate",
    "rotation_signs",
    "select_provider",
    "unpack_codes",
    "unrotate",
]
