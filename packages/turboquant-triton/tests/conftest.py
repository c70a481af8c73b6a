"""Where the kernels run: on a GPU when there is one, else in Triton's interpreter."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

# Tests are imported by path; helpers beside them are found here.
sys.path.insert(0, str(Path(__file__).parent))

# Triton reads this when it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
if os.environ.get("TRITON_INTERPRET") == "1":
    import quick_interpreter

    quick_interpreter.install()


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device under test."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Warnings that are not ours are no errors.

    The interpreter computes with NumPy, which warns of infinities and NaN where a GPU goes on; Triton 3.6's makes a
    scalar of an array of one number, which NumPy deprecates. torch 2.10 and 2.11 warn when ``torch._dynamo`` is
    imported. Of the other packages of a GPU host nothing is known.
    """
    filters = [
        "ignore::RuntimeWarning",
        "ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning",
        "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning",
    ]
    if torch.cuda.is_available():
        filters = ["default"]
    for item in items:
        if item.path.parent == Path(__file__).parent:
            for one in filters:
                item.add_marker(pytest.mark.filterwarnings(one))
