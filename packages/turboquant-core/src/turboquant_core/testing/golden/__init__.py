"""Golden bytes: the definition of layout version 1 by example, read by every provider's conformance test.

``layout_v1.json`` holds, for each head_dim, the seed, the signs, some vectors of small integers, and the packed codes
and scales (hexadecimal) of every (form, bits); ``layout_v1_mixed.json`` those of the same vectors in 2.5 and 3.5 bits.
Same input and codec, same bytes: a file that changes is another layout version. The vectors are integers, which the
rotation maps without rounding up to one last multiplication, and none of their coordinates comes near a boundary: any
right implementation in float32 gives these bytes.
"""

from __future__ import annotations

from .cases import GOLDEN_HEAD_DIMS, GoldenCase, golden_cases, golden_text

__all__ = ["GOLDEN_HEAD_DIMS", "GoldenCase", "golden_cases", "golden_text"]
