"""The command ``turboquant``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ._version import __version__
from .doctor import calibration_ids, examine, report
from .doctor.diagnosis import MAX_DIVERGENCE
from .doctor.simulation import transformers
from .doctor.text import TOKENS
from .errors import TurboQuantError
from .preset import save_preset

SAFE, FAILED, MISUSED, REFUSED = 0, 1, 2, 3
"""Exit statuses; argparse, too, ends with 2."""


class ArgumentError(TurboQuantError):
    """An argument of the command names nothing that it can use."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        0; 1 where it could not be done; 2 where an argument is wrong; 3 where the doctor refuses the model.
    """
    options = _parser().parse_args(arguments)
    try:
        return _doctor(options)
    except TurboQuantError as error:
        print(f"turboquant: {' '.join(str(error).split())}", file=sys.stderr)
        return MISUSED if isinstance(error, ArgumentError) else FAILED


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
    # Before anything is loaded: measuring takes minutes.
    _check_out(options.out)
    _check_device(options.device)
    text = _text(options.text)
    model, tokenizer = _load(options.model, getattr(torch, options.dtype), options.device)
    ids = calibration_ids(tokenizer, text, tokens=options.tokens, device=options.device)
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
        raise ArgumentError(f"--text {path} cannot be read: {error}") from error


def _check_out(path: Path | None) -> None:
    if path is None:
        return
    if path.is_dir():
        raise ArgumentError(f"--out {path} is a folder: name a file in it, such as {path / 'preset.json'}")
    if not path.parent.is_dir():
        raise ArgumentError(f"--out {path}: there is no folder {path.parent}: create it, or name another")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ArgumentError(f"--out {path} may not be written: name a file that may")


def _load(folder: str, dtype: torch.dtype, device: str) -> tuple[Any, Any]:
    library = transformers()
    _check_folder(folder)
    try:
        tokenizer = library.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = library.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ArgumentError(f"{folder} cannot be loaded: {_first_line(error)}") from error
    return model.to(device).eval(), tokenizer


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ArgumentError(f"--device {device} cannot be used: {_first_line(error)}") from error


def _check_folder(folder: str) -> None:
    if not Path(folder).is_dir():
        raise ArgumentError(
            f"{folder} is no folder, and nothing is downloaded here: give the folder of a model and its tokenizer, "
            "such as `hf download NAME --local-dir FOLDER` makes"
        )
    if not (Path(folder) / "config.json").is_file():
        raise ArgumentError(
            f"{folder} has no config.json: give the folder that a model was saved to with its tokenizer"
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
