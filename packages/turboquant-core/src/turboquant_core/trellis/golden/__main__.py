"""Print the golden file."""

from __future__ import annotations

import sys

from . import document

sys.stdout.write(document())
