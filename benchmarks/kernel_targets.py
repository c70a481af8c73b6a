"""What kernels should reach beside FlashAttention-3, memory and vLLM's own, met or missed by measured rows."""

from __future__ import annotations

from page_blocks import Row, verdict

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


def against_flash_attention(rows: list[Row]) -> list[list[str]]:
    """Speed relative to FlashAttention-3, for each shape that has a target."""
    shapes = {row["shape"]: row for row in rows}
    found = []
    for name, limits in LEAST_SPEED.items():
        row = shapes[f"{name}, group 4, head_dim 128"]
        cells = [
            f"{verdict(row['fa3'] / row[f'packed_{bits}'], limits[bits], least=True)}, >= {limits[bits]}"
            if bits in limits
            else "no target"
            for bits in BITS
        ]
        found.append([f"{name}: times as fast as FlashAttention-3", *cells])
    return found


def other_head_dims(rows: list[Row]) -> list[list[str]]:
    """Share of the limit at head_dims 64 and 256, relative to that at head_dim 128."""
    shapes = {row["shape"]: row for row in rows}
    full = shapes["8 x 32K, group 4, head_dim 128"]
    found = []
    for head_dim in (64, 256):
        row = shapes[f"8 x 32K, group 4, head_dim {head_dim}"]
        shares = (share(row, bits) / share(full, bits) for bits in BITS)
        cells = (f"{verdict(s, LEAST_OF_HEAD_DIM_128, least=True)}, >= {LEAST_OF_HEAD_DIM_128}" for s in shares)
        found.append([f"head_dim {head_dim}, 8 x 32K: share of the limit over head_dim 128's", *cells])
    return found


def share(row: Row, bits: int) -> float:
    """Share of the limit that attention reaches."""
    return float(row[f"limit_{bits}"] / row[f"packed_{bits}"])


def storing(rows: list[Row]) -> list[list[str]]:
    """Storing an append, in microseconds, and the tokens of a prompt, as a share of bandwidth."""
    found = []
    stored = [row for row in rows if row["scale_rule"] == STORED]
    for tokens, head_dim in dict.fromkeys((row["tokens"], row["head_dim"]) for row in stored):
        of = {row["bits"]: row for row in stored if (row["tokens"], row["head_dim"]) == (tokens, head_dim)}
        if tokens == APPEND_TOKENS:
            cells = [f"{verdict(of[bits]['store'], MOST_APPEND)}, <= {MOST_APPEND:g}" for bits in BITS]
            found.append([f"storing {tokens} tokens, head_dim {head_dim}: microseconds", *cells])
        else:
            name = f"storing {tokens} tokens, head_dim {head_dim}: share of bandwidth"
            found.append([name, *shares_of_bandwidth(of, "store")])
    return found


def encoding(rows: list[Row]) -> list[list[str]]:
    """Encoding the vectors of a prompt, as a share of bandwidth."""
    found = []
    for head_dim in dict.fromkeys(row["head_dim"] for row in rows):
        of = {row["bits"]: row for row in rows if row["head_dim"] == head_dim and row["scale_rule"] == STORED}
        found.append([f"encode, head_dim {head_dim}: share of bandwidth", *shares_of_bandwidth(of, "encode")])
    return found


def shares_of_bandwidth(of: dict[int, Row], operation: str) -> list[str]:
    """Cells of each width."""
    least = LEAST_SHARE_OF_BANDWIDTH
    return [f"{verdict(of[bits]['limit'] / of[bits][operation], least, least=True)}, >= {least}" for bits in BITS]


def against_rivals(rows: list[Row]) -> list[list[str]]:
    """The least speed over all shapes relative to vLLM's kernels of as many bits; nothing where they were not timed."""
    timed = [row for row in rows if all(name in row for name in RIVALS.values())]
    if not timed:
        return []
    least = (min(row[name] / row[f"packed_{bits}"] for row in timed) for bits, name in RIVALS.items())
    cells = [f"{verdict(ratio, LEAST_TO_RIVAL, least=True)}, >= {LEAST_TO_RIVAL:g}" for ratio in least]
    return [["times as fast as vLLM's TurboQuant, least of all shapes", *cells, "no target"]]
