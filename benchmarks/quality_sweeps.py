"""The questions that `quality.py` answers, each a list of methods."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from quality_codecs import RAW, Automatic, ByLayer, Codecs, MeanOfFirst, Offset
from quality_rivals import Textbook, rivals
from scoring import Method

from turboquant_core.doctor.allocation import allocate
from turboquant_hf.automatic_center import LEAST_TOKENS, LONG_PROMPT
from turboquant_hf.options import RECENT_TOKENS

WIDTHS = (4, 3, 2)
WINDOWS_WITHIN_2_PERCENT = {4: (4, 24), 3: (4, 15), 2: (4, 8)}
"""Sinks and recent tokens of 128 coordinates whose bytes add less than 2 % to 4096 tokens of each width."""
PROMPT = 128
PROBE_BITS = 3
"""Width at which the cost of a layer is measured."""
OFFSET = 3.0


def methods(codecs: Codecs) -> list[Method]:
    """This project beside every rival, rivals with windows of the same size too."""
    ours, experimental = "turboquant", "turboquant, shaped codes"
    found = [codecs.default(f"{ours}, {bits:g} bit", bits, ours) for bits in (4, 3.5, 3, 2.5, 2)]
    found += [codecs.shaped(f"{experimental}, {bits:g} bit", bits, experimental) for bits in (4, 3.5, 3, 2.5, 2)]
    for bits, (sinks, recent) in WINDOWS_WITHIN_2_PERCENT.items():
        windows = {"sinks": sinks, "recent": recent}
        found.append(codecs.default(f"{ours}, {bits} bit, windows {sinks} + {recent}", bits, **windows))
        found.append(codecs.shaped(f"{experimental}, {bits} bit, windows {sinks} + {recent}", bits, **windows))
    found += defaults(codecs)
    found += [
        codecs.trellis(f"turboquant, trellis codes, {b} bit", b, family="turboquant, trellis codes") for b in (3, 2)
    ]
    others = rivals(codecs.seed)[0]
    return found + others + [windowed(method, bits) for bits in WIDTHS for method in others if by_vector(method, bits)]


def by_vector(method: Method, bits: int) -> bool:
    """Whether a rival of ``bits`` stores no more than one scale and one zero for a vector."""
    return method.name.endswith(f", {bits} bit") and method.name.startswith(("fused", "vLLM"))


def windowed(method: Method, bits: int) -> Method:
    """A rival with the windows that this project's methods of ``bits`` are given."""
    sinks, recent = WINDOWS_WITHIN_2_PERCENT[bits]
    name = f"{method.name}, windows {sinks} + {recent}"
    return replace(method, name=name, family=None, sinks=sinks, recent=recent)


def trellis(codecs: Codecs) -> list[Method]:
    """Sequences in place of one level per coordinate; values as they are and keys centred or not."""
    found = []
    for bits in (3, 2):
        centred = codecs.key(bits, center=codecs.calibration.key_mean)
        found += [
            codecs.default(f"{bits} bit", bits),
            codecs.trellis(f"{bits} bit, trellis", bits),
            Method(f"{bits} bit, centred keys", centred, codecs.value(bits)),
            codecs.trellis(f"{bits} bit, trellis, centred keys", bits, centre=True),
            codecs.shaped(f"{bits} bit, shaped codes", bits),
        ]
    return found


def scale_rules(codecs: Codecs) -> list[Method]:
    """Each rule for keys with exact values, and for values with exact keys."""
    rules = ("searched", "unbiased", "renorm", "least_squares", "norm")
    keys = [Method(f"keys {b} bit, {rule}", codecs.key(b, rule), RAW) for b in WIDTHS for rule in rules]
    values = [Method(f"values {b} bit, {rule}", RAW, codecs.value(b, rule)) for b in WIDTHS for rule in rules]
    return keys + values


def shaping(codecs: Codecs) -> list[Method]:
    """What shaped codes bring to keys and to values."""
    mean, found = codecs.calibration.key_mean, []
    for bits in WIDTHS:
        found += [
            Method(f"keys {bits} bit", codecs.key(bits), RAW),
            Method(f"keys {bits} bit, centred", codecs.key(bits, center=mean), RAW),
            Method(f"keys {bits} bit, shaped", codecs.key(bits, shape=True), RAW),
            Method(f"keys {bits} bit, centred, shaped", codecs.key(bits, center=mean, shape=True), RAW),
            Method(f"values {bits} bit", RAW, codecs.value(bits)),
            Method(f"values {bits} bit, shaped", RAW, codecs.value(bits, shape=True)),
        ]
    return found


def signs(codecs: Codecs, bits: int = 3) -> list[Method]:
    """One rotation for everything, one for keys and one for values, one for each layer too; three seeds each."""
    found = []
    for seed in range(codecs.seed, codecs.seed + 3):

        def fixed(layer: int, seed: int = seed) -> int:
            return seed

        def own(layer: int, seed: int = seed) -> int:
            return seed + 1000 * (layer + 1)

        keys = codecs.key(bits, seed_of=fixed)
        found += [
            Method(f"seed {seed}: one", keys, codecs.value(bits, stream=0, seed_of=fixed)),
            Method(f"seed {seed}: keys, values", keys, codecs.value(bits, seed_of=fixed)),
            Method(f"seed {seed}: each layer", codecs.key(bits, seed_of=own), codecs.value(bits, seed_of=own)),
        ]
    return found


def centring(codecs: Codecs) -> list[Method]:
    """Where a fixed vector taken from every key comes from, on the model as it is and with a key bias."""
    calibration, offset, found = codecs.calibration.key_mean, codecs.slow_offset(OFFSET), []
    weights = codecs.weights_mean
    if weights is None:
        raise ValueError("weights_mean is None; centring compares with it: give the mean keys of random tokens")
    for bits in (4, 3):
        plain, values = codecs.key(bits), codecs.value(bits)
        for label, wrap, add in (
            ("as it is", lambda codec: codec, [0.0] * codecs.layers),
            ("key bias", lambda codec: Offset(codec, offset), offset),
        ):
            of_text, of_weights = (
                [mean + vector for mean, vector in zip(means, add, strict=True)] for means in (calibration, weights)
            )
            for name, key in (
                ("none", plain),
                ("calibration text", codecs.key(bits, center=of_text)),
                ("weights", codecs.key(bits, center=of_weights)),
                (f"first {PROMPT} tokens", MeanOfFirst(plain, PROMPT)),
                ("whole sequence", MeanOfFirst(plain, None)),
                (f"automatic, first {LEAST_TOKENS} tokens", Automatic(plain, LEAST_TOKENS)),
                (f"automatic, first {LONG_PROMPT} tokens", Automatic(plain, LONG_PROMPT)),
                ("automatic, whole sequence", Automatic(plain, None)),
            ):
                found.append(Method(f"{bits} bit, {label}: {name}", wrap(key), values))
        biased = Offset(Textbook(bits, codecs.seed, True), offset)
        found.append(Method(f"{bits} bit, key bias: vLLM _nc keys", biased, values))
    return found


def windows(codecs: Codecs, bits: int = 3) -> list[Method]:
    """First and last tokens in full precision."""
    sizes = ((0, 0), (1, 0), (4, 0), (16, 0), (0, 16), (0, 64), (4, 16), (4, 64), (4, 128), (16, 128))
    return [codecs.default(f"{s} sinks, {r} recent", bits, sinks=s, recent=r) for s, r in sizes]


def pages(codecs: Codecs, page: int = 512) -> list[Method]:
    """Windows inside vLLM's blocks of 512 tokens against the same bytes spent on wider codes."""
    found = [codecs.default(f"{bits:g} bit", bits) for bits in (4, 3.5, 3, 2.5, 2)]
    for bits, sizes in ((4, ((4, 0), (4, 24))), (3, ((4, 0), (4, 8), (4, 16), (4, 24))), (2, ((4, 8), (4, 24)))):
        for sinks, recent in sizes:
            method = codecs.default(f"{bits} bit, {sinks} + {recent} in each block", bits, sinks=sinks, recent=recent)
            found.append(replace(method, page=page))
    return found


def keys_and_values(codecs: Codecs) -> list[Method]:
    """Bits of keys against bits of values."""
    pairs = ((4, 4), (4, 3), (3, 4), (4, 2), (3, 3), (2, 4), (3, 2), (2, 3), (2, 2))
    found = [Method(f"keys {k}, values {v}", codecs.key(k), codecs.value(v)) for k, v in pairs]
    found += [
        Method(f"keys {k}, values {v}, shaped", codecs.shaped("", k).key, codecs.shaped("", v).value)
        for k, v in ((4, 2), (3, 3), (2, 4), (3, 2), (2, 3))
    ]
    return found


def boundary(codecs: Codecs) -> list[Method]:
    """First and last layers kept wider, against the same bits spread evenly."""
    n = codecs.layers

    def wider(name: str, ends: int, inner: float, outer: float) -> Method:
        bits = [outer if i < ends or i >= n - ends else inner for i in range(n)]
        keys, values = ([make(b) for b in bits] for make in (codecs.key, codecs.value))
        return Method(name, ByLayer(keys), ByLayer(values))

    raw = [RAW if i < 2 or i >= n - 2 else codecs.value(2) for i in range(n)]
    return [
        codecs.default("2 bit", 2),
        wider("2 bit, first and last layer 4 bit", 1, 2, 4),
        codecs.default("2.5 bit", 2.5),
        wider("2 bit, two first and two last 3 bit", 2, 2, 3),
        wider("2 bit, two first and two last 4 bit", 2, 2, 4),
        codecs.default("3 bit", 3),
        Method("2 bit, values of two first and two last in 16 bits", codecs.key(2), ByLayer(raw)),
    ]


def fractional(codecs: Codecs) -> list[Method]:
    """One bit more for half of the rotated coordinates, against the paper's for a quarter of the channels."""
    found = []
    for bits, widths in ((3.5, (4, 3)), (2.5, (3, 2))):
        found += [codecs.default(f"{bits} bit", bits), codecs.outliers(f"outlier channels, {bits} bit", widths)]
    return found


def defaults(codecs: Codecs) -> list[Method]:
    """What a cache of turboquant-hf does without options, after a prompt as long as the text."""
    found = []
    for bits in WIDTHS:
        key, family = Automatic(codecs.key(bits), None), "turboquant-hf, defaults"
        found.append(Method(f"{family}, {bits} bit", key, codecs.value(bits), family, recent=RECENT_TOKENS))
    return found


def allocation(codecs: Codecs) -> list[Method]:
    """Bits given out by what each layer's keys and values cost on another text, against the same everywhere."""
    if codecs.divergence is None:
        raise SystemExit("allocation needs the divergence of methods on a text that is not scored")
    parts = [(layer, side) for layer in range(codecs.layers) for side in (0, 1)]
    alone = codecs.divergence([codecs.by_layer(f"{part} alone", {part: PROBE_BITS}) for part in parts])
    costs, found = dict(zip(parts, alone, strict=True)), []
    for average in (2.5, 3, 3.5):
        found.append(codecs.default(f"{average:g} bit everywhere", average))
        found.append(codecs.by_layer(f"{average:g} bit on average", allocate(costs, average)))
    return found


def energies(codecs: Codecs) -> list[Method]:
    """Bits by the energy of queries times that of keys, and of output weights times that of values, per layer.

    An error of a key in every direction alike moves scores by the first, one of a value moves outputs by the second;
    both sides together count alike. No divergence is measured.
    """
    seen = codecs.calibration
    costs: dict[tuple[int, int], float] = {}
    pairs = ((seen.query_moment, seen.key_energy), (seen.output_moment, seen.value_energy))
    for side, (moments, sizes) in enumerate(pairs):
        traces = [moment.diagonal(dim1=-2, dim2=-1).sum(-1) for moment in moments]
        own = [float(trace @ size.sum(-1)) for trace, size in zip(traces, sizes, strict=True)]
        costs |= {(layer, side): cost / sum(own) for layer, cost in enumerate(own)}
    found = []
    for average in (2.5, 3, 3.5):
        found.append(codecs.default(f"{average:g} bit everywhere", average))
        found.append(codecs.by_layer(f"{average:g} bit by energies", allocate(costs, average)))
    return found


def preset(codecs: Codecs) -> list[Method]:
    """What the doctor recommends, and its bits and windows in all layers alike without centred keys."""
    if codecs.preset is None:
        raise SystemExit("the sweep preset needs --preset, a file of turboquant doctor")
    found, windows = codecs.preset, codecs.preset.windows
    sizes = {"sinks": windows.sink_tokens, "recent": windows.recent_tokens}
    (keys, values), size = found.bits, f"windows {windows.sink_tokens} + {windows.recent_tokens}"
    plain = Method(f"keys {keys:g}, values {values:g}, {size}", codecs.key(keys), codecs.value(values), **sizes)
    return [codecs.of_preset("recommended", found), plain]


SWEEPS: dict[str, Callable[[Codecs], list[Method]]] = {
    "methods": methods,
    "trellis": trellis,
    "scale_rules": scale_rules,
    "shaping": shaping,
    "signs": signs,
    "centring": centring,
    "windows": windows,
    "pages": pages,
    "keys_and_values": keys_and_values,
    "boundary": boundary,
    "fractional": fractional,
    "defaults": defaults,
    "allocation": allocation,
    "energies": energies,
    "preset": preset,
}
