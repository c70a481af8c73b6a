"""Trellis-coded vectors at 2 and 3 bits (experimental): a third less error than one level per coordinate.

The level of coordinate ``i`` is a function of the last nine stored bits and of the bits of its own, so decoding needs
no recursion; encoding is a search over all sequences (Viterbi). No kernel reads this format yet, and pages do not hold
it: it is here to be measured. ``docs/layout.md`` states every bit and what a kernel would cost.
"""

from __future__ import annotations

from .code import TRELLIS_BITS, TrellisCode, trellis_code, trellis_constants
from .layout import TRELLIS_VERSION, TrellisLayout
from .quantizer import TurboQuantTrellis

__all__ = [
    "TRELLIS_BITS",
    "TRELLIS_VERSION",
    "TrellisCode",
    "TrellisLayout",
    "TurboQuantTrellis",
    "trellis_code",
    "trellis_constants",
]
