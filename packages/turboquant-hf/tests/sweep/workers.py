"""Several processes over the model types."""

from __future__ import annotations

import multiprocessing
import time
import warnings

import torch
from transformers.utils import logging

from .row import Row, sweep_model


def quiet() -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")


def _show(row: Row, seconds: float) -> None:
    state = row.refused or ("equal" if row.is_equal else "NOT EQUAL")
    print(f"{row.model_type:28}{seconds:6.1f}s  {row.patched or ''}  {state}", flush=True)


def sweep(model_types: list[str], workers: int) -> list[Row]:
    """Rows of ``model_types``, in their order."""
    rows, start = [], time.perf_counter()
    # Not forked: a child would inherit torch's thread pool in an unknown state.
    with multiprocessing.get_context("spawn").Pool(workers, quiet, maxtasksperchild=40) as pool:
        for row in pool.imap(sweep_model, model_types):
            rows.append(row)
            _show(row, time.perf_counter() - start)
    return rows
