"""A diagnosis as text."""

from __future__ import annotations

from collections.abc import Sequence

from ..preset import Preset
from .diagnosis import PROBE_BITS, Diagnosis, LayerReport
from .statistics import HeadStatistics

NOT_MEASURED = (
    "not measured: retrieval. Divergence on a short text does not say whether a model still finds what stands far\n"
    "back; before long contexts, ask the preset needle prompts, with turboquant's repository:\n"
    "python benchmarks/retrieval.py MODEL_FOLDER PROMPTS --preset FILE"
)


def report(diagnosis: Diagnosis) -> str:
    """Tables of layers and of choices, and the refusal, or the recommendation and what it does not rest on."""
    parts = [
        f"{diagnosis.model.model_type}, {diagnosis.model.layers} layers, {diagnosis.tokens} tokens of text",
        _layers(diagnosis),
        *(f"layer {index} stays as it is: {reason}" for index, reason in sorted(diagnosis.left_out.items())),
        _probes(diagnosis.probes),
        _verdicts(diagnosis),
        _conclusion(diagnosis),
    ]
    return "\n\n".join(parts) + "\n"


def _aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    lines = ("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in (header, *rows))
    return "\n".join(lines)


def _layers(diagnosis: Diagnosis) -> str:
    bits = list(diagnosis.layers[0].keys[0].errors)
    header = ["layer", "", "head", "offset", "kurtosis", "spread", "first", *(f"{b:g} bit" for b in bits), "alone"]
    rows = [row for layer in diagnosis.layers for row in _layer_rows(layer)]
    legend = (
        "offset: bits lost to a constant offset; kurtosis: excess, after rotation; spread: norms, 99 % over median;\n"
        "first: norm of the first token over the median; N bit: squared error over the variance;\n"
        f"alone: nats per token with only this layer's keys or values packed, at {PROBE_BITS} bits (* spared)"
    )
    return f"{_aligned(header, rows)}\n{legend}"


def _layer_rows(layer: LayerReport) -> list[list[str]]:
    rows = []
    for kind, heads in (("K", layer.keys), ("V", layer.values)):
        rows += [[str(layer.index), kind, str(head), *_figures(found), ""] for head, found in enumerate(heads)]
    mark = "*" if layer.spared else " "
    rows[0][-1] = f"{layer.key_divergence:.4f}{mark}"
    rows[len(layer.keys)][-1] = f"{layer.value_divergence:.4f}{mark}"
    return rows


def _figures(found: HeadStatistics) -> list[str]:
    numbers = (found.offset_bits, found.kurtosis, found.norm_spread, found.first_norm)
    return [*(f"{number:.2f}" for number in numbers), *(f"{error:.4f}" for error in found.errors.values())]


def _probes(probes: dict[str, float]) -> str:
    return f"nats per token at {PROBE_BITS} bits: " + ", ".join(f"{name} {loss:.4f}" for name, loss in probes.items())


def _verdicts(diagnosis: Diagnosis) -> str:
    rows = [
        [
            f"{verdict.bits[0]:g}, {verdict.bits[1]:g}{'*' if verdict.allocated else ' '}",
            str(verdict.windows.sink_tokens),
            str(verdict.windows.recent_tokens),
            f"{verdict.divergence:.4f}",
            f"{verdict.same_top:.3f}",
            "safe" if verdict.reason is None else f"unsafe: {verdict.reason}",
        ]
        for verdict in diagnosis.verdicts
    ]
    table = _aligned(["K, V bits", "sinks", "recent", "nats", "same top"], [row[:-1] for row in rows])
    judged = ["", *(row[-1] for row in rows)]
    lines = [f"{line}  {word}".rstrip() for line, word in zip(table.split("\n"), judged, strict=True)]
    return "\n".join([*lines, "* on average: wider for layers, keys or values that cost more"])


def _conclusion(diagnosis: Diagnosis) -> str:
    if diagnosis.preset is None:
        return f"refused: no choice is safe for this model; {diagnosis.refusal}"
    return f"recommended: {_recommendation(diagnosis.preset)}\n\n{NOT_MEASURED}"


def _recommendation(preset: Preset) -> str:
    parts = [f"keys {preset.bits[0]:g} bits, values {preset.bits[1]:g} bits"]
    parts += [f"layer {i}: {pair[0]:g} and {pair[1]:g}" for i, pair in sorted(preset.layers.items())]
    parts.append("keys centred" if preset.centers else "keys not centred")
    parts.append(
        f"{preset.windows.sink_tokens} sink and {preset.windows.recent_tokens} recent tokens in full precision"
    )
    return "; ".join(parts)
