"""How a decode step is run: as it is, compiled to one graph, or compiled and recorded in CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch._dynamo.utils import counters

Mode: TypeAlias = Literal["eager", "compiled", "graphs"]
MODES: tuple[Mode, ...] = get_args(Mode)
LABELS: dict[Mode, str] = {"eager": "", "compiled": ", compiled", "graphs": ", CUDA graphs"}
"""What a mode adds to the name of a cache."""


def why_not(mode: Mode, device: torch.device) -> str | None:
    """Why ``mode`` cannot run on ``device``; None when it can."""
    if mode == "graphs" and device.type != "cuda":
        return f"CUDA graphs need a CUDA device, this is {device.type!r}"
    return None


@contextmanager
def one_graph(model: Any, mode: Mode, backend: str) -> Iterator[Callable[..., Any]]:
    """``model.forward`` as ``mode`` runs it.

    Args:
        model: whose forward is compiled, whole (``fullgraph=True``).
        mode: see :data:`MODES`.
        backend: of ``torch.compile``; graphs are recorded by inductor alone.

    Raises:
        RuntimeError: a step was compiled again, or steps were not recorded: what was timed is not what it is called.
    """
    if mode == "eager":
        yield model.forward
        return
    torch.compiler.reset()
    counters.clear()
    how: dict[str, Any] = {"mode": "reduce-overhead"} if mode == "graphs" else {"backend": backend}
    step = torch.compile(model.forward, fullgraph=True, dynamic=False, **how)

    def recorded(*args: Any, **kwargs: Any) -> Any:
        # Earlier outputs, which the graph will write over, are no longer needed.
        torch.compiler.cudagraph_mark_step_begin()
        return step(*args, **kwargs)

    try:
        with torch._dynamo.config.patch(error_on_recompile=True):
            yield recorded if mode == "graphs" else step
        if skips := counters["inductor"]["cudagraph_skips"]:
            raise RuntimeError(f"inductor recorded no CUDA graph of {skips} graphs")
    finally:
        torch.compiler.reset()
