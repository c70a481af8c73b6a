"""Where the kernels run: on a GPU when there is one, else in Triton's interpreter."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest
import torch

# Triton reads this when it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device under test."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _quiet_numpy() -> Iterator[None]:
    """The interpreter computes with NumPy, which warns of infinities and NaN where a GPU goes on."""
    with np.errstate(all="ignore"):
        yield
