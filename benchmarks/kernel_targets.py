"""What kernels should reach beside FlashAttention-3, memory and vLLM's own, met or missed by measured rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from page_blocks import NOT_MEASURED, Row, verdict

BITS = (4, 3, 2)
LEAST_SPEED = {
    "32 x 32K": {4: 3.3, 3: 3.8, 2: 5.0},
    "8 x 32K": {4: 2.8, 3: 3.0, 2: 4.0},
    "32 x 8K": {4: 2.8, 3: 3.0, 2: 4.0},
    "1 x 128K": {4: 2.5, 3: 2.5, 2: 3.0},
    "1 x 32K": {4: 1.7},
    "1 x 4K": {4: 1.0},
}
"""Of a decode step relative to FlashAttention-3, with four query heads a KV head and head_dim 128."""
LEAST_OF_HEAD_DIM_128 = 0.85
"""Of the share of the limit that head_dim 128 reaches, at other head_dims."""
LEAST_SHARE_OF_BANDWIDTH = 0.5
"""Of the limit, when the tokens of a prompt are stored or encoded."""
MOST_APPEND = 8.0
"""Microseconds to store 32 tokens."""
APPEND_TOKENS = 32
STORED = "searched"
"""The scale rule of caches: targets are for what they do."""
LEAST_TO_RIVAL = 10.0
RIVALS = {4: "turboquant_4bit_nc", 3: "turboquant_3bit_nc"}
"""vLLM's own, by bits."""


def by_shape(rows: list[Row]) -> dict[str, Row]:
    """Rows of attention; those that FlashAttention-3 was not timed for decide nothing."""
    return {row["shape"]: row for row in rows if "fa3" in row}


def least_of(figure: Callable[[int], float | None], least: Callable[[int], float | None]) -> list[str]:
    """A cell for each width: ``figure(bits)``, which a cut run lacks, beside the target ``least(bits)``, if any."""
    return [cell(figure(bits), least(bits), least=True) for bits in BITS]


def cell(value: float | None, limit: float | None, *, least: bool) -> str:
    """Value, verdict and limit."""
    if limit is None:
        return "no target"
    said = NOT_MEASURED if value is None else verdict(value, limit, least=least)
    return f"{said}, {'>=' if least else '<='} {limit:g}"


def against_flash_attention(rows: list[Row]) -> list[list[str]]:
    """Speed relative to FlashAttention-3, for each shape that has a target."""
    shapes = by_shape(rows)
    found = []
    for name, limits in LEAST_SPEED.items():
        row = shapes.get(f"{name}, group 4, head_dim 128")
        cells = least_of(lambda bits, row=row: row and row["fa3"] / row[f"packed_{bits}"], limits.get)
        found.append([f"{name}: times as fast as FlashAttention-3", *cells])
    return found


def other_head_dims(rows: list[Row]) -> list[list[str]]:
    """Share of the limit at head_dims 64 and 256, relative to that at head_dim 128."""
    shapes = {row["shape"]: row for row in rows}
    found = []
    for head_dim in (64, 256):
        full, row = (shapes.get(f"8 x 32K, group 4, head_dim {size}") for size in (128, head_dim))
        cells = least_of(
            lambda bits, full=full, row=row: share(row, bits) / share(full, bits) if row and full else None,
            lambda _: LEAST_OF_HEAD_DIM_128,
        )
        found.append([f"head_dim {head_dim}, 8 x 32K: share of the limit over head_dim 128's", *cells])
    return found


def share(row: Row, bits: int) -> float:
    """Share of the limit that attention reaches."""
    return float(row[f"limit_{bits}"] / row[f"packed_{bits}"])


def classes(rows: list[Row], *keys: str) -> dict[tuple[int, ...], dict[int, Row]]:
    """Rows of what caches store, by ``keys`` and width."""
    found: dict[tuple[int, ...], dict[int, Row]] = {}
    for row in rows:
        if row["scale_rule"] == STORED:
            found.setdefault(tuple(row[key] for key in keys), {})[row["bits"]] = row
    return found


def storing(rows: list[Row]) -> list[list[str]]:
    """Storing an append, in microseconds, and the tokens of a prompt, as a share of bandwidth."""
    found = []
    for (tokens, head_dim), of in classes(rows, "tokens", "head_dim").items():
        name = f"storing {tokens} tokens, head_dim {head_dim}"
        if tokens == APPEND_TOKENS:
            times = (of[bits]["store"] if bits in of else None for bits in BITS)
            found.append([f"{name}: microseconds", *(cell(time, MOST_APPEND, least=False) for time in times)])
        else:
            found.append([f"{name}: share of bandwidth", *shares_of_bandwidth(of, "store")])
    return found


def encoding(rows: list[Row]) -> list[list[str]]:
    """Encoding the vectors of a prompt, as a share of bandwidth."""
    return [
        [f"encode, head_dim {head_dim}: share of bandwidth", *shares_of_bandwidth(of, "encode")]
        for (head_dim,), of in classes(rows, "head_dim").items()
    ]


def shares_of_bandwidth(of: Mapping[int, Row], operation: str) -> list[str]:
    """Cells of each width."""
    return least_of(
        lambda bits: of[bits]["limit"] / of[bits][operation] if bits in of else None,
        lambda _: LEAST_SHARE_OF_BANDWIDTH,
    )


def against_rivals(rows: list[Row]) -> list[list[str]]:
    """The least speed over all shapes relative to vLLM's kernels of as many bits; nothing where they were not timed."""
    timed = [row for row in rows if all(name in row for name in RIVALS.values())]
    if not timed:
        return []
    least = (min(row[name] / row[f"packed_{bits}"] for row in timed) for bits, name in RIVALS.items())
    cells = [f"{verdict(ratio, LEAST_TO_RIVAL, least=True)}, >= {LEAST_TO_RIVAL:g}" for ratio in least]
    return [["times as fast as vLLM's TurboQuant, least of all shapes", *cells, "no target"]]
