"""A packed TurboQuant KV cache for Hugging Face Transformers.

::

    from turboquant_hf import patch_model

    cache = patch_model(model, bits=4)
    model.generate(**inputs, cache=cache)  # past_key_values=cache before Transformers 5.24
"""

from __future__ import annotations

from ._version import __version__
from .cache import TurboQuantCache
from .cache_file import CacheFileError
from .compatibility import Compatibility, check_model_compatibility
from .memory import CacheMemory
from .patch import patch_model, turboquant, unpatch_model
from .quality import LayerQuality, QualityWarning
from .shaping import Shaping, measure_shaping
from .static_cache import TurboQuantStaticCache
from .summary import LayerSummary, Summary
from .verify import Verification, verify_model

__all__ = [
    "CacheFileError",
    "CacheMemory",
    "Compatibility",
    "LayerQuality",
    "LayerSummary",
    "QualityWarning",
    "Shaping",
    "Summary",
    "TurboQuantCache",
    "TurboQuantStaticCache",
    "Verification",
    "__version__",
    "check_model_compatibility",
    "measure_shaping",
    "patch_model",
    "turboquant",
    "unpatch_model",
    "verify_model",
]
