"""From a model and a text to a preset, or to the reason why there is none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from ..errors import LayoutError
from ..layout import VectorLayout
from ..preset import Fingerprint, Preset
from ..rotation import rotation_signs
from ..windows import Windows
from .allocation import allocate
from .simulation import DoctorError, Treatment, divergence, keys_alone, run, values_alone
from .statistics import HeadStatistics, codecs, describe

PAIRS: tuple[tuple[float, float], ...] = ((2, 2), (2.5, 2.5), (3, 2), (3, 3), (3.5, 3.5), (4, 3), (4, 4))
"""Bits of keys and of values that are tried."""
PROBE_BITS = 3
"""Width at which centring, sinks and single layers are compared: errors are plain there."""
AVERAGES = (2.5, 3, 3.5)
"""Bits that are given out among layers, keys and values by what each costs."""
SPARED_BITS = 4
SINK_TOKENS = 4
RECENT_TOKENS = 64
MAX_DIVERGENCE = 0.05
"""Nats per token over a cache packed to its last token; bits that cost more are called unsafe."""
RESCUE = 1.25
"""A recent window makes bits safe that cost at most this many times the limit without one. Most of what a short text
looks at lies in the window, so that a small figure with it says little about what is further back."""
WORTHWHILE_WINDOW = 0.5
"""A recent window is recommended where it leaves less than this part of the divergence."""
WORTHWHILE = 0.95
"""Centring and sinks are recommended where they leave less than this part of the divergence."""
SPARE_FACTOR = 4.0
"""A layer is spared when it alone diverges this many times more than the median layer, and by its share."""
SPARE_SHARE = 0.2
FRACTIONS_NEED = 16
"""Fractional bits need a head_dim that is a multiple of this."""
SMALLEST_TEXT = 128
"""Tokens below which nothing can be said."""


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One packable layer.

    Attributes:
        index: position in the model.
        keys: statistics of each KV head.
        values: the same of values.
        key_divergence: nats per token when its keys alone are packed, at :data:`PROBE_BITS`.
        value_divergence: the same of its values.
        spared: whether it gets :data:`SPARED_BITS` where all others get the same.
    """

    index: int
    keys: list[HeadStatistics]
    values: list[HeadStatistics]
    key_divergence: float
    value_divergence: float
    spared: bool

    @property
    def divergence(self) -> float:
        """Of keys and values together, but for what they have to do with one another."""
        return self.key_divergence + self.value_divergence


@dataclass(frozen=True, slots=True)
class Verdict:
    """One choice of bits and windows.

    Attributes:
        bits: (keys, values); the average of each where they differ by layer.
        windows: tokens in full precision.
        divergence: nats per token.
        same_top: share of tokens with the same most probable next token.
        reason: why it is unsafe; None when it is safe.
        layers: (keys, values) of the layers that differ from ``bits``.
        allocated: whether bits were given out by what each layer costs.
    """

    bits: tuple[float, float]
    windows: Windows
    divergence: float
    same_top: float
    reason: str | None
    layers: Mapping[int, tuple[float, float]] = field(default_factory=dict)
    allocated: bool = False


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What the doctor found.

    Attributes:
        model: whose.
        tokens: of the text.
        layers: packable layers.
        left_out: reason by layer index, for layers that stay as they are.
        probes: divergence at :data:`PROBE_BITS` by what was tried: ``plain``, ``centred``, ``sinks``.
        verdicts: for each of :data:`PAIRS` and :data:`AVERAGES`, and again with a recent window where that can make it
            safe or better.
        preset: the recommendation; None when every choice is unsafe.
    """

    model: Fingerprint
    tokens: int
    layers: list[LayerReport]
    left_out: dict[int, str]
    probes: dict[str, float]
    verdicts: list[Verdict]
    preset: Preset | None

    @property
    def refusal(self) -> str | None:
        """Why there is no preset; None when there is one."""
        if self.preset is not None:
            return None
        worst = max(self.layers, key=lambda layer: layer.divergence)
        widest = max(self.verdicts, key=lambda verdict: sum(verdict.bits))
        return (
            f"at {widest.bits[0]:g} bits {widest.reason}; layer {worst.index} alone costs most, "
            f"{worst.divergence:.3g} at {PROBE_BITS} bits"
        )


def examine(model: Any, ids: Tensor, *, max_divergence: float = MAX_DIVERGENCE, windows: bool = True) -> Diagnosis:
    """Run a text through a model with exact and with simulated packed caches, and choose a preset.

    Makes about ``2 * layers + 24`` passes over the text.

    Args:
        model: a causal language model of Transformers, in evaluation mode.
        ids: int64 ``[1, tokens]`` on the model's device, at least :data:`SMALLEST_TEXT` tokens of real text.
        max_divergence: nats per token that a safe preset may cost.
        windows: whether sinks and recent tokens may stay in full precision; vLLM's pages hold neither.

    Raises:
        DoctorError: the text is too short, no layer can be packed, or the model itself gives no finite probabilities.
        PresetError: the model's configuration lacks a size.
    """
    if ids.dim() != 2 or ids.shape[0] != 1 or ids.shape[1] < SMALLEST_TEXT:
        raise DoctorError(f"the text is {tuple(ids.shape)} tokens; give [1, at least {SMALLEST_TEXT}]: a longer --text")
    examination = _Examination(model, ids, max_divergence, windows)
    return examination.diagnosis()


@dataclass(frozen=True, slots=True)
class _Choice:
    """Bits (keys, values) of all layers but ``layers``."""

    bits: tuple[float, float]
    layers: Mapping[int, tuple[float, float]]
    allocated: bool = False


class _Examination:
    """The runs over one text, each compared with the exact one."""

    def __init__(self, model: Any, ids: Tensor, max_divergence: float, windows: bool) -> None:
        self._model, self._ids, self._limit, self._windows = model, ids, max_divergence, windows
        self._exact, past = run(model, ids, None)
        if not bool(self._exact.isfinite().all()):
            raise DoctorError("the model itself gives probabilities that are not finite: load it in another dtype")
        self._vectors, self._left_out = _packable(past, ids.shape[1], _text_config(model))
        if not self._vectors:
            raise DoctorError(f"no layer can be packed: {'; '.join(sorted(set(self._left_out.values())))}")

    def diagnosis(self) -> Diagnosis:
        """Try, choose, report."""
        treatment, probes = self._centre_and_sinks()
        keys = {index: self._divergence(keys_alone(treatment, index)) for index in self._vectors}
        values = {index: self._divergence(values_alone(treatment, index)) for index in self._vectors}
        spared = _outlying({index: keys[index] + values[index] for index in self._vectors})
        choices = [_even(pair, self._vectors, spared) for pair in PAIRS if self._packs(pair)]
        choices += [_allocated(average, keys, values) for average in AVERAGES]
        verdicts = [verdict for choice in choices for verdict in self._verdicts(treatment, choice)]
        fingerprint = Fingerprint.of(self._model.config)
        return Diagnosis(
            model=fingerprint,
            tokens=self._ids.shape[1],
            layers=[self._layer(i, keys[i], values[i], i in spared) for i in self._vectors],
            left_out=self._left_out,
            probes=probes,
            verdicts=verdicts,
            preset=self._preset(fingerprint, treatment, verdicts),
        )

    def _packs(self, pair: tuple[float, float]) -> bool:
        """Whether every layer has a layout for such bits."""
        dims = [vectors.shape[-1] for both in self._vectors.values() for vectors in both]
        return all(isinstance(bits, int) for bits in pair) or all(dim % FRACTIONS_NEED == 0 for dim in dims)

    def _run(self, treatment: Treatment) -> Tensor:
        return run(self._model, self._ids, treatment)[0]

    def _divergence(self, treatment: Treatment) -> float:
        return divergence(self._exact, self._run(treatment))

    def _centre_and_sinks(self) -> tuple[Treatment, dict[str, float]]:
        """The treatment at :data:`PROBE_BITS` with what is worthwhile, and what each step gave."""
        best = Treatment(dict.fromkeys(self._vectors, (PROBE_BITS, PROBE_BITS)))
        probes = {"plain": self._divergence(best)}
        steps = {"sinks": replace(best, windows=Windows(sink_tokens=SINK_TOKENS))} if self._windows else {}
        if tolerates_centre(_text_config(self._model)):
            centers = {index: keys.float().mean(1) for index, (keys, _) in self._vectors.items()}
            steps = {"centred": replace(best, centers=centers)} | steps
        least = probes["plain"]
        for name, step in steps.items():
            tried = replace(step, centers=step.centers or best.centers)
            probes[name] = self._divergence(tried)
            if probes[name] < WORTHWHILE * least:
                best, least = tried, probes[name]
        return best, probes

    def _verdicts(self, treatment: Treatment, choice: _Choice) -> list[Verdict]:
        """Without a recent window, and with one where the first is not hopeless."""
        plain = self._verdict(treatment, choice, 0)
        if self._windows and plain.divergence <= RESCUE * self._limit:
            return [plain, self._verdict(treatment, choice, RECENT_TOKENS)]
        return [plain]

    def _verdict(self, treatment: Treatment, choice: _Choice, recent: int) -> Verdict:
        bits = {index: choice.layers.get(index, choice.bits) for index in self._vectors}
        windows = replace(treatment.windows, recent_tokens=recent)
        got = self._run(replace(treatment, bits=bits, windows=windows))
        loss = divergence(self._exact, got)
        same = float((got.argmax(-1) == self._exact.argmax(-1)).float().mean())
        # Not "loss > limit": a divergence that is NaN is no safe one.
        safe = loss <= self._limit
        reason = None if safe else f"it diverges by {loss:.3g} nats per token, the limit is {self._limit:g}"
        return Verdict(choice.bits, windows, loss, same, reason, choice.layers, choice.allocated)

    def _layer(self, index: int, key_alone: float, value_alone: float, spared: bool) -> LayerReport:
        keys, values = self._vectors[index]
        return LayerReport(
            index=index,
            keys=describe(keys, codecs(keys.shape[-1], keys=True, device=keys.device)),
            values=describe(values, codecs(values.shape[-1], keys=False, device=values.device)),
            key_divergence=key_alone,
            value_divergence=value_alone,
            spared=spared,
        )

    def _preset(self, model: Fingerprint, treatment: Treatment, verdicts: list[Verdict]) -> Preset | None:
        chosen = _chosen(verdicts)
        if chosen is None:
            return None
        return Preset(
            model=model,
            bits=chosen.bits,
            layers=chosen.layers,
            windows=chosen.windows,
            centers={index: center.cpu() for index, center in treatment.centers.items()},
            measured={"divergence": chosen.divergence, "same_top": chosen.same_top, "tokens": self._ids.shape[1]},
        )


def _even(pair: tuple[float, float], layers: Iterable[int], spared: set[int]) -> _Choice:
    """The same bits everywhere but in spared layers."""
    wide = max(pair[0], SPARED_BITS), max(pair[1], SPARED_BITS)
    return _Choice(pair, {index: wide for index in layers if index in spared and wide != pair})


def _allocated(average: float, keys: Mapping[int, float], values: Mapping[int, float]) -> _Choice:
    """Bits by what keys and values of each layer cost."""
    costs = {(index, side): cost for side, own in enumerate((keys, values)) for index, cost in own.items()}
    given = allocate({part: max(cost, 0.0) for part, cost in costs.items()}, average)
    pairs = {index: (given[index, 0], given[index, 1]) for index in keys}
    pair = (average, average)
    return _Choice(pair, {index: own for index, own in pairs.items() if own != pair}, allocated=True)


def _chosen(verdicts: list[Verdict]) -> Verdict | None:
    """The safe choice of fewest bits, of those the one that diverges least without a recent window (the same bits
    everywhere unless others are worthwhile); with the window where it is worthwhile.
    """
    choices: dict[tuple[tuple[float, float], bool], list[Verdict]] = {}
    for verdict in verdicts:
        choices.setdefault((verdict.bits, verdict.allocated), []).append(verdict)
    safe = [own for own in choices.values() if any(verdict.reason is None for verdict in own)]
    if not safe:
        return None

    def rank(own: list[Verdict]) -> tuple[float, float]:
        plain = own[0]
        return sum(plain.bits), plain.divergence / (WORTHWHILE if plain.allocated else 1)

    plain, *windowed = min(safe, key=rank)
    worthwhile = [v for v in windowed if plain.reason or v.divergence < WORTHWHILE_WINDOW * plain.divergence]
    return worthwhile[0] if worthwhile else plain


def _outlying(alone: dict[int, float]) -> set[int]:
    """Layers that cost far more than the others."""
    median, total = sorted(alone.values())[(len(alone) - 1) // 2], sum(alone.values())
    return {i for i, loss in alone.items() if loss > SPARE_FACTOR * median and loss >= SPARE_SHARE * total}


def _text_config(model: Any) -> Any:
    return model.config.get_text_config(decoder=True)


def tolerates_centre(config: Any) -> bool:
    """A centre shifts every score of a row alike: a soft-cap or attention sinks would see it."""
    return getattr(config, "attn_logit_softcapping", None) is None and config.model_type != "gpt_oss"


def _packable(past: Any, tokens: int, config: Any) -> tuple[dict[int, tuple[Tensor, Tensor]], dict[int, str]]:
    """Keys and values ``[kv_heads, tokens, head_dim]`` of the layers that can be packed; reasons of the others."""
    types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    found, left_out = {}, {}
    for index, layer in enumerate(past.layers):
        keys = getattr(layer, "keys", None)
        if types[index] != "full_attention":
            left_out[index] = f"it is {types[index]}"
        elif not isinstance(keys, Tensor) or keys.dim() != 4 or keys.shape[2] != tokens:
            left_out[index] = "its cache holds no key for each token"
        else:
            reason = _unpackable(keys.shape[-1]) or _unpackable(layer.values.shape[-1])
            if reason is None:
                found[index] = (keys[0], layer.values[0])
            else:
                left_out[index] = reason
    return found, left_out


def _unpackable(head_dim: int) -> str | None:
    try:
        VectorLayout(head_dim, SPARED_BITS, "int8")
        rotation_signs(head_dim)
    except LayoutError as error:
        return str(error)
    return None
