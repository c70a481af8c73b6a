"""The doctor: looks at a model's keys and values, and recommends a preset or says why none is safe.

``turboquant doctor MODEL_FOLDER`` is the command; :func:`examine` is the same for a model that is loaded. Needs
Transformers, imported when it is first used.
"""

from __future__ import annotations

from .diagnosis import Diagnosis, LayerReport, Verdict, examine
from .simulation import DoctorError
from .statistics import HeadStatistics, offset_bits
from .table import report
from .text import calibration_ids, default_text

__all__ = [
    "Diagnosis",
    "DoctorError",
    "HeadStatistics",
    "LayerReport",
    "Verdict",
    "calibration_ids",
    "default_text",
    "examine",
    "offset_bits",
    "report",
]
