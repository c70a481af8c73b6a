"""Options of a cache from a preset: from its file, from the doctor's object, or measured on the model itself."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal, TypeAlias

from torch import Tensor
from transformers import AutoTokenizer, PreTrainedConfig

from turboquant_core import TurboQuantError
from turboquant_core.doctor import calibration_ids, examine
from turboquant_core.layout import check_bits
from turboquant_core.preset import Preset, load_preset

from .arguments import check_ids
from .compat import PreTrainedModel
from .options import Bits
from .shaping import measure_shaping

BitsOrPreset: TypeAlias = Bits | Preset | Literal["auto"] | str | os.PathLike[str]
DECIDED = ("center_keys", "sink_tokens", "recent_tokens", "start_after")
"""Options that a preset decides together with the bits."""


def preset_options(preset: Preset, config: PreTrainedConfig) -> dict[str, Any]:
    """Arguments of :class:`TurboQuantCache` that a preset decides, ``bits`` among them.

    Raises:
        PresetError: the preset belongs to another model.
    """
    preset.check(config)
    return {
        "bits": {index: preset.layer_bits(index) for index in range(preset.model.layers)},
        "center_keys": dict(preset.centers) or False,
        "sink_tokens": preset.windows.sink_tokens,
        "recent_tokens": preset.windows.recent_tokens,
        "start_after": preset.windows.start_after,
    }


def resolve(
    model: PreTrainedModel, bits: BitsOrPreset, options: dict[str, Any], calibration: Tensor | None = None
) -> tuple[Bits, dict[str, Any]]:
    """Bits and options of a cache, with a preset's in place of ``bits`` where that is one.

    Args:
        model: that the cache is for.
        bits: of :class:`TurboQuantCache`, a preset, its file, or ``"auto"``.
        options: of :class:`TurboQuantCache`; ``shaped=True`` is measured.
        calibration: int64 ``[1, tokens]`` to measure on; None takes the doctor's text and the model's tokenizer.

    Raises:
        TurboQuantError: the doctor refuses the model, or has no text for it.
        ValueError: no such file, a preset of another model, or options that the preset decides.
    """
    if options.get("shaped") is True:
        options = options | {"shaped": measure_shaping(model, _ids(model, calibration, "shaped=True"))}
    if not isinstance(bits, Preset | str | os.PathLike):
        return bits, options
    taken = [name for name in DECIDED if name in options]
    if taken:
        raise ValueError(
            f"{taken[0]} is given beside a preset, which decides it: leave it out, or give bits as numbers"
        )
    decided = preset_options(_preset(model, bits, calibration), model.config)
    return decided.pop("bits"), options | decided


def _preset(model: PreTrainedModel, bits: Preset | str | os.PathLike[str], calibration: Tensor | None) -> Preset:
    if isinstance(bits, Preset):
        return bits
    if bits == "auto":
        return measured_preset(model, calibration)
    if isinstance(bits, str) and _is_number(bits):
        check_bits(bits)
    if not Path(bits).is_file():
        raise ValueError(f"bits is {os.fspath(bits)!r}, which is no file: give a preset's path, 'auto' or numbers")
    return load_preset(bits)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def measured_preset(model: PreTrainedModel, calibration: Tensor | None = None) -> Preset:
    """What the doctor recommends for a loaded model (:func:`turboquant_core.doctor.examine`).

    Raises:
        TurboQuantError: it refuses, or the model has no tokenizer in its folder and ``calibration`` is None.
    """
    ids = _ids(model, calibration, "bits='auto'")
    diagnosis = examine(model, ids)
    if diagnosis.preset is None:
        raise TurboQuantError(
            f"the doctor finds no safe bits for {type(model).__name__}; {diagnosis.refusal}: give bits as numbers and "
            "compare outputs, or leave the cache uncompressed"
        )
    return diagnosis.preset


def _ids(model: PreTrainedModel, calibration: Tensor | None, option: str) -> Tensor:
    """What is measured on: ``calibration``, or the doctor's text with the tokenizer in the model's folder."""
    if calibration is not None:
        check_ids("calibration", calibration)
        return calibration.to(model.device)
    folder = model.config.name_or_path
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise TurboQuantError(
            f"{option} found no tokenizer in {folder!r}: pass calibration, token ids [1, a few hundred] of real text"
        ) from error
    return calibration_ids(tokenizer, device=model.device)
