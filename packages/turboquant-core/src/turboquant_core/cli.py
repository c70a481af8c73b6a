"""The command ``turboquant``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ._version import __version__
from .doctor import DoctorError, calibration_ids, examine, report
from .doctor.diagnosis import MAX_DIVERGENCE
from .doctor.simulation import transformers
from .doctor.text import TOKENS
from .errors import TurboQuantError
from .preset import save_preset

SAFE, FAILED, REFUSED = 0, 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        0; 1 where it could not be done; 2 where the doctor refuses the model.
    """
    options = _parser().parse_args(arguments)
    try:
        return _doctor(options)
    except TurboQuantError as error:
        print(f"turboquant: {error}", file=sys.stderr)
        return FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="turboquant", description="Packed KV caches.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    doctor = commands.add_parser("doctor", help="look at a model's keys and values and recommend a preset")
    doctor.add_argument("model", metavar="MODEL_FOLDER", help="folder of a Transformers model and its tokenizer")
    doctor.add_argument("--text", type=Path, help="plain text to run (default: a text in the public domain)")
    doctor.add_argument("--tokens", type=int, default=TOKENS, help="tokens of it (default: %(default)s)")
    doctor.add_argument("--out", type=Path, help="write the preset here, as JSON")
    doctor.add_argument("--device", default="cpu", help="where the model runs (default: %(default)s)")
    doctor.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    doctor.add_argument(
        "--no-windows",
        action="store_true",
        help="pack every token: for vLLM with blocks of fewer than 128 tokens",
    )
    doctor.add_argument(
        "--max-divergence",
        type=float,
        default=MAX_DIVERGENCE,
        help="nats per token that a safe preset may cost (default: %(default)s)",
    )
    return parser


def _doctor(options: argparse.Namespace) -> int:
    model, tokenizer = _load(options.model, getattr(torch, options.dtype), options.device)
    ids = calibration_ids(tokenizer, _text(options.text), tokens=options.tokens, device=options.device)
    diagnosis = examine(model, ids, max_divergence=options.max_divergence, windows=not options.no_windows)
    print(report(diagnosis), end="")
    if diagnosis.preset is None:
        return REFUSED
    if options.out is not None:
        save_preset(diagnosis.preset, options.out)
        print(f"written to {options.out}")
    return SAFE


def _text(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DoctorError(f"--text {path} cannot be read: {error}") from error


def _load(folder: str, dtype: torch.dtype, device: str) -> tuple[Any, Any]:
    library = transformers()
    try:
        tokenizer = library.AutoTokenizer.from_pretrained(folder)
        model = library.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    except (OSError, ValueError, KeyError) as error:
        raise DoctorError(f"{folder} cannot be loaded: {error}") from error
    return model.to(device).eval(), tokenizer
