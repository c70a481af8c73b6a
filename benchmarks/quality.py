"""What codecs of keys and values cost a model: KL divergence against full precision, per true bit.

MODEL is a Hugging Face folder with causal attention, TEXT any text. Every scored token is predicted by attention that
reads quantised keys and values in every layer (`scoring.py`); `--sweep` picks the questions. Rivals are measured in the
same run; hqq and quanto where they are installed.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import math
import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from calibration import calibrate, random_rows
from quality_codecs import Codecs
from quality_rivals import rivals
from quality_sweeps import SWEEPS
from report import digest, table, version, write_json
from scoring import FULL, NAME, Method, Sums, prepare, score, windows
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from turboquant_core.preset import Preset, load_preset
from turboquant_hf import patch_model, unpatch_model

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
TINY = ROOT / "examples" / "models" / "tiny"
CONSTITUTION = ROOT / "examples" / "data" / "constitution.txt"
BITS_AT = 4096
"""Tokens at which true bits are stated: full-precision windows weigh less in longer contexts."""
AGREEMENT_BITS = (4, 3, 2)
COST_WINDOWS = 2
"""Windows of the calibration text on which each layer's cost is measured."""
COLUMNS = ("method", "bits", "KL", "standard error", "loss %", "bits per byte", "same top")


@dataclass(frozen=True)
class Setup:
    """Everything that the sweeps share.

    Attributes:
        model: prepared.
        rows: windows of token ids ``[context]``.
        bytes_per_token: of the text.
        codecs: for this model.
    """

    model: Any
    rows: list[Tensor]
    bytes_per_token: float
    codecs: Codecs


def load(folder: Path, device: str) -> tuple[Any, Any]:
    """Model in float32, so that nothing but the codec rounds, and tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.eval().to(device), tokenizer


def token_ids(tokenizer: Any, text: str) -> Tensor:
    """Ids ``[n]`` of a text of any length."""
    return torch.tensor(tokenizer(text, verbose=False).input_ids)


def cut(arguments: argparse.Namespace, tokenizer: Any, ids: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Windows to score and windows to calibrate with, of another text or of the second half of the same one."""
    rows = windows(ids, arguments.context)
    if arguments.calibration.resolve() == arguments.text.resolve():
        rows, rest = rows[: -(-len(rows) // 2)], rows[-(-len(rows) // 2) :]
    else:
        calibration = token_ids(tokenizer, arguments.calibration.read_text(encoding="utf-8"))
        rest = windows(calibration, arguments.context)
    if not rest:
        raise SystemExit("one window of text is too little to score and to calibrate: name another --calibration")
    return rows[: arguments.windows], rest[: arguments.calibration_windows]


def set_up(arguments: argparse.Namespace) -> tuple[Setup, dict[str, Any]]:
    """Load, cut, calibrate; also the settings for the JSON."""
    model, tokenizer = load(arguments.model, arguments.device)
    text = arguments.text.read_text(encoding="utf-8")[: arguments.characters]
    ids = token_ids(tokenizer, text)
    rows, rest = cut(arguments, tokenizer, ids)
    prepare(model)
    calibration = calibrate(model, rest)
    config = model.config.get_text_config(decoder=True)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    def divergence(methods: list[Method]) -> list[float]:
        sums = score(model, rest[:COST_WINDOWS], methods, arguments.batch)
        return [sums[method.name].kl / sums[method.name].tokens for method in methods]

    codecs = Codecs(
        config.num_hidden_layers,
        head_dim,
        arguments.seed,
        calibration,
        divergence,
        chosen_preset(arguments.preset, config),
        calibrate(model, random_rows(config.vocab_size, arguments.context, len(rest), arguments.seed)).key_mean,
    )
    scored = tokenizer.decode(torch.cat(rows))
    settings = {
        "model": arguments.model.resolve().name,
        "model_sha256": digest(arguments.model / "model.safetensors"),
        "text": arguments.text.name,
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "calibration": f"{arguments.calibration.name}, {calibration.tokens} tokens",
        "context": arguments.context,
        "tokens": sum(len(row) for row in rows),
        "seed": arguments.seed,
        "bits_at": BITS_AT,
        "absent": rivals(arguments.seed)[1],
        "rivals": {name: version(name) for name in ("hqq", "optimum-quanto")},
    }
    return Setup(model, rows, len(scored.encode()) / sum(len(row) for row in rows), codecs), settings


def chosen_preset(path: Path | None, config: Any) -> Preset | None:
    """The preset in a file, for this model."""
    if path is None:
        return None
    preset = load_preset(path)
    preset.check(config)
    return preset


def row_of(method: Method, sums: Sums, base: Sums, setup: Setup) -> dict[str, Any]:
    """Figures of one method."""
    spread = torch.tensor(sums.by_window, dtype=torch.float64)
    return {
        "method": method.name,
        "family": method.family,
        "bits": method.bits(setup.codecs.head_dim, setup.codecs.layers, BITS_AT),
        "KL": sums.kl / sums.tokens,
        "standard error": float(spread.std(correction=1) / len(spread) ** 0.5) if len(spread) > 1 else None,
        "loss %": 100 * (sums.loss / base.loss - 1),
        "bits per byte": sums.loss / sums.tokens / math.log(2) / setup.bytes_per_token,
        "perplexity": math.exp(sums.loss / sums.tokens),
        "same top": sums.same_top / sums.tokens,
    }


def run_sweep(setup: Setup, name: str, rows: list[Tensor], batch: int) -> list[dict[str, Any]]:
    """Figures of a sweep's methods, full precision first."""
    methods = SWEEPS[name](setup.codecs)
    sums = score(setup.model, rows, methods, batch)
    return [row_of(method, sums[method.name], sums[FULL.name], setup) for method in (FULL, *methods)]


def agreement(setup: Setup) -> list[dict[str, Any]]:
    """The packed cache of turboquant-hf in chunks, beside one pass over the same codec, on the first window.

    A cache's first call attends to its tokens in full precision; with a first call of one token both are the same
    computation, but for rounding.
    """
    sys.path.insert(0, str(ROOT / "examples"))
    from comparison import Sample
    from comparison import score as score_through_cache

    ids, found = setup.rows[0].unsqueeze(0).to(setup.model.device), []
    sample = Sample(ids[:, :1], ids[:, 1:], 0)
    for bits in AGREEMENT_BITS:
        setup.model.set_attn_implementation("sdpa")
        cache = patch_model(setup.model, bits, recent_tokens=0, center_keys=False)
        packed = score_through_cache(setup.model, cache, sample, lambda _: None).unsqueeze(0)
        unpatch_model(setup.model)
        setup.model.set_attn_implementation(NAME)
        method = replace(setup.codecs.default("", bits), prompt=1)
        one_pass = score(setup.model, [ids[0]], [method], given={"packed cache": packed})
        found.append({"bits": bits, **{name or "one pass": sums.kl / sums.tokens for name, sums in one_pass.items()}})
    return found


def plot(results: dict[str, Any], target: Path) -> None:
    """KL divergence against true bits per coordinate, one line for each family."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    rows, settings = results["sweeps"]["methods"], results["settings"]
    title = f"{settings['model']}, {settings['text']}"
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for family in dict.fromkeys(row["family"] for row in rows if row["family"]):
        points = sorted((row["bits"], row["KL"]) for row in rows if row["family"] == family)
        ours = family.startswith("turboquant")
        axes.semilogy(*zip(*points, strict=True), "o-" if ours else "s--", label=family, linewidth=2 if ours else 1)
    axes.set(xlabel="true bits per coordinate", ylabel="KL divergence (nats per token)", title=title)
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=120)
    plt.close(figure)


def parse() -> argparse.Namespace:
    """The command line, --quick resolved."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=TINY)
    parser.add_argument("text", type=Path, nargs="?", default=CONSTITUTION)
    parser.add_argument("--calibration", type=Path, default=CONSTITUTION, help="text that is not scored")
    parser.add_argument("--calibration-windows", type=int, default=6)
    parser.add_argument("--characters", type=int, default=60_000, help="of the text")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=10**6, help="how many contexts to score")
    parser.add_argument("--side-windows", type=int, default=4, help="the same for all sweeps but 'methods'")
    parser.add_argument("--sweep", nargs="+", choices=SWEEPS, default=[s for s in SWEEPS if s != "preset"])
    parser.add_argument("--preset", type=Path, help="for the sweep 'preset'")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=2, help="windows at once")
    parser.add_argument("--quick", action="store_true", help="'methods' on a few short windows, no files")
    parser.add_argument("--render", action="store_true", help="tables and plot of the JSON that is there, no run")
    parser.add_argument("--json", type=Path, help="default: results/quality_MODEL.json")
    parser.add_argument("--plot", type=Path, help="default: docs/images/quality_MODEL.png")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.sweep, arguments.windows, arguments.context = ["methods"], 2, 192
    name = arguments.model.resolve().name
    arguments.json = arguments.json or HERE / "results" / f"quality_{name}.json"
    arguments.plot = arguments.plot or ROOT / "docs" / "images" / f"quality_{name}.png"
    return arguments


def render(arguments: argparse.Namespace) -> None:
    """Tables and plot from a JSON file."""
    results = json.loads(arguments.json.read_text(encoding="utf-8"))["results"]
    for name, rows in results["sweeps"].items():
        show(name, rows)
    if "agreement" in results:
        show_agreement(results["agreement"])
    if "methods" in results["sweeps"]:
        plot(results, arguments.plot)


def show(name: str, rows: list[dict[str, Any]]) -> None:
    """Print the table of a sweep."""
    print(f"\n{name.replace('_', ' ')}\n")
    print(table(COLUMNS, [[row[column] for column in COLUMNS] for row in rows]), flush=True)


def show_agreement(rows: list[dict[str, Any]]) -> None:
    """Print :func:`agreement`."""
    print("\nthrough the packed cache and in one pass\n")
    print(table(list(rows[0]), [list(row.values()) for row in rows]))


def main() -> None:
    arguments = parse()
    if arguments.render:
        render(arguments)
    else:
        measure(arguments)


def measure(arguments: argparse.Namespace) -> None:
    """Run the sweeps, write and print."""
    setup, settings = set_up(arguments)
    results: dict[str, Any] = {"settings": settings, "sweeps": {}}
    if settings["absent"]:
        print(f"not installed, so absent: {', '.join(settings['absent'])}")
    for name in arguments.sweep:
        start = time.perf_counter()
        windows = setup.rows if name == "methods" else setup.rows[: arguments.side_windows]
        rows = results["sweeps"][name] = run_sweep(setup, name, windows, arguments.batch)
        show(name, rows)
        print(f"{time.perf_counter() - start:.0f} s", file=sys.stderr)
        if not arguments.quick:
            write_json(arguments.json, results, arguments.device)
    if "methods" in results["sweeps"]:
        finish(setup, results, arguments)


def finish(setup: Setup, results: dict[str, Any], arguments: argparse.Namespace) -> None:
    """The packed cache beside one pass, and the plot."""
    rows = results["agreement"] = agreement(setup)
    show_agreement(rows)
    if arguments.quick:
        return
    write_json(arguments.json, results, arguments.device)
    if importlib.util.find_spec("matplotlib") is None:
        print("matplotlib is not installed: draw the plot with --render where it is")
    else:
        plot(results, arguments.plot)


if __name__ == "__main__":
    main()
