"""Run the sweep: ``python -m tests.sweep [--workers N] [--write] [model types]`` from the package's folder."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .expectations import MULTIMODAL, differences, expected_rows, write_rows
from .fronted_row import sweep_fronted
from .multimodal import FRONTED
from .page import write_page
from .workers import sweep


def main() -> int:
    """Sweep, then compare with the expectations or write them; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model_types", nargs="*", help="all that Transformers has when none is given")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="make what is found the expectation, and write the page")
    arguments = parser.parse_args()
    start = time.perf_counter()
    rows = sweep(arguments.model_types or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), arguments.workers)
    found = {row.model_type: row for row in rows}
    states = Counter("refused" if row.refused else "equal" if row.is_equal else "not equal" for row in rows)
    print(f"{dict(states)} in {time.perf_counter() - start:.0f} s")
    if arguments.write:
        write_rows(found, replace_all=not arguments.model_types)
        if not arguments.model_types:
            write_rows({name: sweep_fronted(name) for name in FRONTED}, replace_all=True, folder=MULTIMODAL)
        write_page()
        return 0
    problems = differences(expected_rows(), found)
    print("\n".join(problems) or "as expected")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
