"""The text that a model is examined on."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

TOKENS = 512


def default_text() -> str:
    """About nine thousand characters of the Constitution of the United States (1787), in the public domain."""
    return files(__package__).joinpath("data/text.txt").read_text(encoding="utf-8")


def calibration_ids(
    tokenizer: Any, text: str | None = None, *, tokens: int = TOKENS, device: torch.device | str = "cpu"
) -> Tensor:
    """The first ``tokens`` tokens of a text (None: :func:`default_text`): int64 ``[1, at most tokens]``.

    Args:
        tokenizer: of Transformers.
        text: any plain text.
        tokens: at most so many.
        device: where the ids live.
    """
    ids = tokenizer(default_text() if text is None else text)["input_ids"][:tokens]
    return torch.tensor([ids], dtype=torch.int64, device=device)
