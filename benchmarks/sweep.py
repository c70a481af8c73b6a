"""Launch parameters of the kernels, one class of layout at a time: every combination checked, then timed.

A combination that does not fit the GPU, or whose result differs from that of the default parameters, is named so and
not timed. The winners belong into ``turboquant_triton.tuning`` and ``turboquant_triton.launch``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import chain, islice, product
from typing import Any
from unittest import mock

import torch
from timing import microseconds
from torch import Tensor
from triton.errors import TritonError
from triton.runtime.errors import OutOfResources

from turboquant_triton.launch import RowsConfig
from turboquant_triton.tuning import AttendConfig

TOLERANCE = 1e-2
WARPS_PER_MULTIPROCESSOR = {None: (8, 12), 128: (16,), 96: (20,)}


def attend_configs() -> Iterator[AttendConfig]:
    """Tiles, warps, pipeline depth, and as many programs on a multiprocessor as the registers let in."""
    for block, num_warps, num_stages in product((32, 64, 128), (1, 2, 4), (2, 3, 4)):
        for max_registers, resident in WARPS_PER_MULTIPROCESSOR.items():
            for warps in resident:
                yield AttendConfig(block, num_warps, num_stages, max(warps // num_warps, 1), max_registers)


def warp_configs() -> Iterator[AttendConfig]:
    """The same of the kernel of single warps, which has no pipeline depth."""
    for block, (programs, registers) in product((32, 64), ((20, 96), (16, 128), (14, 144), (12, 168), (8, 255))):
        yield AttendConfig(block, 1, 1, programs, registers, single_warps=True)


def rows_configs() -> Iterator[RowsConfig]:
    """Rows of a tile, warps and pipeline depth of encode and store."""
    for block, num_warps, num_stages in product((16, 32, 64, 128), (1, 2, 4, 8), (1, 2)):
        yield RowsConfig(block, num_warps, num_stages)


def timed(step: Callable[[], Tensor], expected: Tensor) -> float | str:
    """Microseconds, or why there are none."""
    try:
        got = step().float()
    except OutOfResources as error:
        return f"does not fit: {error.name} {error.required} of {error.limit}"
    except TritonError as error:
        return f"does not compile: {type(error).__name__}"
    if not bool((got - expected).norm() <= TOLERANCE * expected.norm()):
        return "wrong"
    return microseconds(step)


def compile_share(
    step: Callable[[], Tensor], configs: Iterator[Any], patched: Callable[[Any], Any], share: tuple[int, int]
) -> None:
    """Run each configuration of a ``share`` (number, of how many) once; what does not fit is for the sweep to say."""
    for config in islice(configs, share[0], None, share[1]):
        with patched(config), suppress(TritonError):
            step()


def sweep(
    step: Callable[[], Tensor],
    configs: Iterator[Any],
    patched: Callable[[Any], Any],
    share: tuple[int, int] | None = None,
) -> list[dict[str, Any]]:
    """One row for each configuration, the fastest first; the one in use is the row ``default``.

    No row with a ``share``, which is only compiled.
    """
    if share is not None:
        compile_share(step, configs, patched, share)
        return []
    expected = step().float().clone()
    rows = [{"config": "default", "result": microseconds(step)}]
    for config in configs:
        with patched(config):
            rows.append({"config": str(config), "result": timed(step, expected)})
        torch.cuda.empty_cache()
    return sorted(rows, key=lambda row: row["result"] if isinstance(row["result"], float) else float("inf"))


def sweep_attend(
    step: Callable[[], Tensor], single_warps: bool, share: tuple[int, int] | None = None
) -> list[dict[str, Any]]:
    """Over the parameters of the byte-permute form, and of ``single_warps`` where these support the layout.

    ``step`` allocates its workspace, whose size depends on them.
    """
    name = "turboquant_triton.attend.config_for"
    configs = chain(attend_configs(), warp_configs() if single_warps else ())
    return sweep(step, configs, lambda config: mock.patch(name, return_value=config), share)


def sweep_store(step: Callable[[], Tensor], share: tuple[int, int] | None = None) -> list[dict[str, Any]]:
    """Over the parameters of encode and store, for whatever number of rows ``step`` has."""
    name = "turboquant_triton.launch.launch_parameters"
    return sweep(step, rows_configs(), lambda config: mock.patch(name, return_value=config), share)
