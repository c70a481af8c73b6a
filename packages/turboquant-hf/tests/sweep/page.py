"""docs/compatibility.md, from the expectations of the newest release and nothing else."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from .expectations import MULTIMODAL, newest_file, read_rows
from .rivals import NOTES, ROWS
from .row import Row

PAGE = Path(__file__).parents[4] / "docs" / "compatibility.md"

INTRODUCTION = """\
# Compatibility

Made by `nox -s sweep -- --write` from Transformers {version}; a test compares this page with the file it is made from.

Every causal language model of Transformers is built small with random weights, its own head_dim (up to 256) and its own
kinds of layers, and generates over a packed cache whose codec loses nothing. Tokens and logits must be those of the
stock cache: for one prompt, a left-padded batch, a prompt in chunks, and a second turn on the same cache. The packed
cache is used on the patched model and, padded batch only, on an untouched one; the stock cache is used again on the
patched model and after `unpatch_model`. The padded batch also runs over a [static
cache](hf.md#compiled-steps-and-cuda-graphs); "stock fails" is said there of a model for which Transformers' own static
cache fails or gives something else than its growing one.

{counts}

The path is that of the patched model's layers, with their number in the small model; [what the paths
mean](hf.md). `uncompressed` layers stay as Transformers makes them. Mistral is built without its sliding window, and
static caches pack theirs (`compress_sliding=True`): a model whose layers are all sliding windows has nothing to pack
without that option, and says so.
"""

DECODED = """
## Decoded, and why

The patched model's attention, or part of its calls, gets decoded keys and values: right, with the packed cache's memory
between steps, at no gain in speed. `cache.summary()` says the same of your model.
"""

DECODED_UNTOUCHED = """
These are decoded only as long as the model is not patched:
"""


def _path(paths: dict[str, int]) -> str:
    return ", ".join(f"{path} {count}" for path, count in paths.items()) or "none"


def _modes(row: Row) -> str:
    failed = {mode: outcome for mode, outcome in row.modes.items() if outcome != "equal"}
    if not failed:
        return "all"
    stock = [mode for mode, outcome in failed.items() if outcome.startswith("stock fails")]
    ours = [mode for mode in failed if mode not in stock]
    parts = [f"refused or different: {', '.join(ours)}"] if ours else []
    equal = [mode for mode, outcome in row.modes.items() if outcome == "equal"]
    parts += [f"stock fails: {', '.join(stock)}"] if stock else []
    return "; ".join([", ".join(equal) or "none", *parts])


def _outcome(text: str | None) -> str:
    return "" if text is None else text.split(":")[0]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(map(_cell, row)) + " |" for row in rows)])


def _swept(rows: dict[str, Row]) -> str:
    head = ("model type", "own head_dim", "packed key/value", "patched", "untouched", "modes equal", "static")
    table = [
        (
            row.model_type,
            "" if row.own_head_dim is None else str(row.own_head_dim),
            ", ".join(row.head_dims),
            _path(row.patched),
            _path(row.untouched),
            _modes(row),
            _outcome(row.static),
        )
        for row in rows.values()
        if not row.refused
    ]
    # What has an image or an encoder in front is not swept over static caches.
    columns = len(head) if any(cells[-1] for cells in table) else len(head) - 1
    return _table(head[:columns], [cells[:columns] for cells in table])


def _is_decoded(paths: dict[str, int]) -> bool:
    return any("decoded" in path for path in paths)


def _reasons(decoded: list[tuple[Row, list[str]]]) -> str:
    """Model types with their reasons, the most common ones first."""
    why = {row.model_type: "; ".join(reasons) for row, reasons in decoded}
    frequency = Counter(why.values())
    order = sorted(why, key=lambda name: (-frequency[why[name]], why[name], name))
    return _table(("model type", "why"), [(name, why[name]) for name in order])


def _refused(rows: dict[str, Row]) -> str:
    return _table(("model type", "why"), [(name, row.refused) for name, row in rows.items() if row.refused])


def _ours(name: str, model_types: tuple[str, ...], rows: dict[str, Row]) -> str:
    found = [rows[model_type] for model_type in model_types if model_type in rows]
    if not found:
        return f"not tested: {NOTES[name]}"
    return "; ".join(row.refused or f"{_path(row.patched)}; modes equal: {_modes(row)}" for row in found)


def _rivals(rows: dict[str, Row]) -> str:
    table = [
        (row.name, row.verdict, ", ".join(row.model_types), _ours(row.name, row.model_types, rows)) for row in ROWS
    ]
    return _table(("model", "fused-turboquant 0.1.0", "model type", "here"), table)


def _counts(rows: dict[str, Row]) -> str:
    tested = [row for row in rows.values() if not row.refused]
    paths = Counter(" and ".join(sorted({path for path in row.patched if path != "uncompressed"})) for row in tested)
    equal = sum(row.is_equal for row in tested)
    by_path = ", ".join(f"{path} {count}" for path, count in paths.most_common())
    static = Counter(_outcome(row.static) for row in tested)
    by_outcome = ", ".join(f"{outcome} {count}" for outcome, count in static.most_common())
    return (
        f"Of {len(rows)} model types {len(tested)} can be tested so, {equal} of them equal. By path: {by_path}.\n"
        f"Over a static cache: {by_outcome}."
    )


def page() -> str:
    """The page's text."""
    rows, multimodal = read_rows(newest_file()), read_rows(newest_file(MULTIMODAL))
    tested = [*rows.values(), *multimodal.values()]
    untouched = [row for row in tested if not _is_decoded(row.patched)]
    parts = [
        INTRODUCTION.format(version=newest_file().stem, counts=_counts(rows)),
        "## Causal language models\n",
        _swept(rows),
        "\n## With an image, or an encoder\n",
        "The image goes through the vision tower, which stays untouched; cross-attention stays uncompressed.\n",
        _swept(multimodal),
        DECODED,
        _reasons([(row, row.reasons) for row in tested if _is_decoded(row.patched)]),
        DECODED_UNTOUCHED,
        _reasons([(row, row.untouched_reasons) for row in untouched if _is_decoded(row.untouched)]),
        "\n## Beside fused-turboquant\n",
        "Every row of that project's own tables, refused ones included.\n",
        _rivals({**rows, **multimodal}),
        "\n## Not tested\n",
        "No small model can be built from its configuration alone, or none of its layers can be packed.\n",
        _refused(rows),
    ]
    return "\n".join(parts) + "\n"


def write_page() -> None:
    """Write the page."""
    PAGE.write_text(page())
