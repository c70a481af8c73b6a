"""What packed decoding should reach beside Transformers' caches, met or missed by measured rows."""

from __future__ import annotations

from typing import Any

STOCK = "DynamicCache bf16"
STATIC_STOCK = "StaticCache bf16"
LEAST_SPEED = {(1, 4096): 1.0, (1, 131072): 1.5}
"""Of packed decoding relative to the stock cache, by batch and context."""
LEAST_SPEED_TO_QUANTIZED = 5.0
LEAST_SAVING = 0.95
"""Of peak memory in decoding, relative to the saving in bytes of keys and values."""
SAVING_CONTEXT = 32768

Row = dict[str, Any]


def _target(name: str, row: Row, least: float, found: float) -> Row:
    case = f"{row['batch']} x {row['context']}"
    return {"target": name, "case": case, "cache": row["cache"], "least": least, "found": found, "met": found >= least}


def _saving(row: Row, stock: Row) -> list[Row]:
    saved = stock["kv_bytes"] - row["kv_bytes"]
    if row["context"] != SAVING_CONTEXT or "decode_peak_bytes" not in row:
        return []
    share = (stock["decode_peak_bytes"] - row["decode_peak_bytes"]) / saved
    return [_target("peak memory saved, of the KV saving", row, LEAST_SAVING, share)]


def stock_of(cache: str) -> str:
    """The ordinary cache whose steps are run in the same way."""
    _, comma, mode = cache.partition(",")
    return f"{STATIC_STOCK}{comma}{mode}" if comma else STOCK


def _speed(row: Row, stock: Row) -> list[Row]:
    least = LEAST_SPEED.get((row["batch"], row["context"]))
    if least is None:
        return []
    return [_target(f"speed to {stock['cache']}", row, least, row["tokens_per_second"] / stock["tokens_per_second"])]


def _against_quantized(row: Row, others: list[Row]) -> list[Row]:
    # Its steps can neither be compiled nor recorded: what a user has instead of ours, however ours are run.
    how = "" if stock_of(row["cache"]) == STOCK else ", eager"
    return [
        _target(
            f"speed to {other['cache']}{how}",
            row,
            LEAST_SPEED_TO_QUANTIZED,
            row["tokens_per_second"] / other["tokens_per_second"],
        )
        for other in others
        if other["cache"].startswith("QuantizedCache")
    ]


def targets(rows: list[Row]) -> list[Row]:
    """Every target that the rows decide, in their order; a row without figures decides none.

    Returns:
        ``target``, ``case``, ``cache``, ``least``, ``found`` (ratios) and ``met`` of each.
    """
    measured = [row for row in rows if "tokens_per_second" in row]
    found: list[Row] = []
    for row in measured:
        if not row["cache"].startswith("turboquant"):
            continue
        others = [o for o in measured if (o["batch"], o["context"]) == (row["batch"], row["context"])]
        for stock in (other for other in others if other["cache"] == stock_of(row["cache"])):
            found += _saving(row, stock) + _speed(row, stock)
        found += _against_quantized(row, others)
    return found
