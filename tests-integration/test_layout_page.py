"""A codec written from docs/layout.md alone: constants are read from the page's tables, steps follow its sentences.

Of turboquant_core only results are taken, to be compared.
"""

from __future__ import annotations

import json
import re
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from turboquant_core import CacheCodec, PageLayout, RawLayout, ReferenceProvider, VectorLayout, rotation_signs
from turboquant_core.hadamard import hadamard_matrix, supported_order
from turboquant_core.testing.golden import golden_text
from turboquant_core.trellis import TurboQuantTrellis
from turboquant_core.trellis.golden import golden_text as trellis_text

PAGE = (Path(__file__).parents[1] / "docs" / "layout.md").read_text(encoding="utf-8")
MASK = 2**64 - 1


# What the page's tables say ------------------------------------------------------------------------------------------


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split()]


def constants() -> dict[tuple[str, int], tuple[Any, float]]:
    """(form, bits) to (q_table or c, step)."""
    found: dict[tuple[str, int], tuple[Any, float]] = {}
    for bits, table, step in re.findall(r"\| `int8` \| (\d) \| `q_table` ([\d ]+), `step` ([\d.]+) \|", PAGE):
        found["int8", int(bits)] = numbers(table), float(step)
    for bits, c, step in re.findall(r"\| `cubic` \| (\d) \| `c` ([\d.]+), `step` ([\d.]+) \|", PAGE):
        found["cubic", int(bits)] = float(c), float(step)
    return found


def trellis_constants() -> dict[int, tuple[list[int], list[int], float]]:
    """Bits to (masks, q_table, step)."""
    rows = re.findall(r"\| (\d) \| (\d+ \d+ \d+) \| ([\d ]+) \| ([\d.]+) \|", PAGE)
    return {int(bits): (numbers(masks), numbers(table), float(step)) for bits, masks, table, step in rows}


CONSTANTS, TRELLIS = constants(), trellis_constants()


def mirrored(table: list[int], step: float) -> np.ndarray:
    upper = [(q + 0.5) * step for q in table]
    return np.array([-level for level in reversed(upper)] + upper)


def levels(form: str, bits: int) -> np.ndarray:
    table, step = CONSTANTS[form, bits]
    if form == "int8":
        return mirrored(table, step)
    h = np.arange(2**bits) - (2**bits - 1) / 2
    return step * h * (h * h + table)


# Signs ---------------------------------------------------------------------------------------------------------------


def mix(s: int) -> int:
    s = ((s ^ (s >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    s = ((s ^ (s >> 27)) * 0x94D049BB133111EB) & MASK
    return s ^ (s >> 31)


def signs(d: int, seed: int, stream: int) -> np.ndarray:
    state, found = (mix(seed) + stream) & MASK, []
    for _ in range(d):
        state = (state + 0x9E3779B97F4A7C15) & MASK
        found.append(-1 if mix(state) >> 63 else 1)
    return np.array(found)


# The Hadamard matrix -------------------------------------------------------------------------------------------------


def prime_power(q: int) -> tuple[int, int] | None:
    for p in range(2, q + 1):
        if q % p == 0:
            k = 1
            while p**k < q:
                k += 1
            return (p, k) if p**k == q else None
    return None


def times_x(a: tuple[int, ...], g: tuple[int, ...], p: int) -> tuple[int, ...]:
    """``x * a`` where ``x**k`` is ``g_0 + g_1 x + ...``."""
    return tuple((low + a[-1] * c) % p for low, c in zip((0, *a[:-1]), g, strict=True))


def powers_of_x(p: int, k: int) -> list[tuple[int, ...]]:
    """All elements but 0, ``x**0`` first, modulo the first polynomial for which they are all."""
    for g in product(range(p), repeat=k):
        if g[0] == 0:
            continue
        element, found = (1,) + (0,) * (k - 1), []
        while element not in found:
            found.append(element)
            element = times_x(element, g, p)
        if len(found) == p**k - 1:
            return found
    raise AssertionError


def characters(p: int, k: int) -> dict[tuple[int, ...], int]:
    """``chi`` of every element: squares are the even powers of an element whose powers are all."""
    if k == 1:
        squares = {n * n % p for n in range(1, p)}
        return {(n,): 0 if n == 0 else 1 if n in squares else -1 for n in range(p)}
    return {element: 1 - 2 * (i % 2) for i, element in enumerate(powers_of_x(p, k))} | {(0,) * k: 0}


def jacobsthal(q: int) -> np.ndarray:
    p, k = prime_power(q) or (0, 0)
    chi = characters(p, k)
    elements = [tuple(i // p**place % p for place in range(k)) for i in range(q)]
    return np.array([[chi[tuple((x - y) % p for x, y in zip(a, b, strict=True))] for b in elements] for a in elements])


def paley_one(q: int) -> np.ndarray:
    base = np.ones((q + 1, q + 1), dtype=int)
    base[1:, 0] = -1
    base[1:, 1:] = jacobsthal(q)
    for i in range(q + 1):
        base[i, i] = 1
    return base


def paley_two(q: int) -> np.ndarray:
    c = np.ones((q + 1, q + 1), dtype=int)
    c[0, 0] = 0
    c[1:, 1:] = jacobsthal(q)
    base = np.zeros((2 * q + 2, 2 * q + 2), dtype=int)
    for i, j in product(range(q + 1), repeat=2):
        block = [[1, -1], [-1, -1]] if i == j else [[c[i, j], c[i, j]], [c[i, j], -c[i, j]]]
        base[2 * i : 2 * i + 2, 2 * j : 2 * j + 2] = block
    return base


def base_of(m: int, most: int) -> tuple[str, int] | None:
    """Kind and ``q`` of the base of order ``m`` whose ``q`` is at most the ``most``-th power of a prime."""
    if m == 1:
        return "one", 1
    for kind, q, rest in (("Paley I", m - 1, 3), ("Paley II", m // 2 - 1, 1)):
        field = prime_power(q)
        if m % 2 == 0 and q % 4 == rest and field is not None and field[1] <= most:
            return kind, q
    return None


def plan(d: int) -> tuple[int, str, int] | None:
    """``m``, kind and ``q``."""
    orders = sorted(d >> n for n in range(d.bit_length()) if d % (1 << n) == 0)
    for most in (1, 99):
        for m in orders:
            found = base_of(m, most)
            if found is not None:
                return m, *found
    return None


@cache
def hadamard(d: int) -> np.ndarray:
    m, kind, q = plan(d) or (0, "", 0)
    base = {"one": lambda _: np.ones((1, 1), dtype=int), "Paley I": paley_one, "Paley II": paley_two}[kind](q)
    n = d // m
    within = np.array([[1 - 2 * ((i & j).bit_count() % 2) for j in range(n)] for i in range(n)])
    return np.kron(base, within)


# Codes, scales, rows -------------------------------------------------------------------------------------------------


def parts(d: int, bits: float) -> list[tuple[int, int]]:
    """Coordinates and width of each part of a row."""
    return [(d, int(bits))] if bits == int(bits) else [(d // 2, int(bits) + 1), (d // 2, int(bits))]


def encode(x: np.ndarray, bits: float, form: str, seed: int, stream: int) -> tuple[bytes, np.float16]:
    d = len(x)
    z = hadamard(d) @ (signs(d, seed, stream) * x) / np.sqrt(d)
    unit = z / np.sqrt((z * z).mean())
    row, chosen, first = [], [], 0
    for size, width in parts(d, bits):
        table = levels(form, width)
        boundaries = ((table[1:] + table[:-1]) / 2).astype(np.float32)
        codes = np.array([int((boundaries < np.float32(u)).sum()) for u in unit[first : first + size]])
        row.append(pack(codes, width, form))
        chosen.append(table.astype(np.float32)[codes])
        first += size
    scale = (z @ z) / (z @ np.concatenate(chosen).astype(float))
    return b"".join(row), np.float16(min(scale, 65504))


def pack(codes: np.ndarray, b: int, form: str) -> bytes:
    d = len(codes)
    nibbles = [0] * (d * b // 4)
    if b == 4 and form == "cubic":
        nibbles = list(codes)
    elif b == 4:
        for i, code in enumerate(codes):
            t, j = divmod(i, 8)
            word = (code - 8 if code >= 8 else 7 - code) << (4 * j)
            if code < 8:
                word |= 1 << (8 * j + 7 if j < 4 else 8 * (j - 4) + 3)
            for nibble in range(8):
                nibbles[8 * t + nibble] |= (word >> (4 * nibble)) & 15
    elif b == 3:
        quarter = d // 4
        for p, i in product(range(3), range(quarter)):
            nibbles[p * quarter + i] = codes[p * quarter + i] | ((codes[3 * quarter + i] >> p) & 1) << 3
    else:
        nibbles = [codes[i] | codes[d // 2 + i] << 2 for i in range(d // 2)]
    row = bytearray(d * b // 8)
    for i, nibble in enumerate(nibbles):
        row[i // 2] |= int(nibble) << (4 * (i % 2))
    return bytes(row)


# The comparisons -----------------------------------------------------------------------------------------------------


def golden() -> list[dict[str, Any]]:
    cases = json.loads(golden_text())["cases"]
    mixed = {case["head_dim"]: case["packed"] for case in json.loads(golden_text(mixed=True))["cases"]}
    return [{**case, "packed": case["packed"] + mixed[case["head_dim"]]} for case in cases]


def test_levels() -> None:
    assert set(CONSTANTS) == set(product(("int8", "cubic"), (2, 3, 4)))
    for entry in json.loads(golden_text())["levels"]:
        np.testing.assert_array_equal(levels(entry["form"], entry["bits"]), entry["levels"])


@pytest.mark.parametrize("case", golden(), ids=lambda case: str(case["head_dim"]))
def test_golden_bytes(case: dict[str, Any]) -> None:
    d, seed, stream = case["head_dim"], case["seed"], case["stream"]
    assert "".join("+" if sign > 0 else "-" for sign in signs(d, seed, stream)) == case["signs"]
    for packed in case["packed"]:
        for x, codes, scale in zip(case["vectors"], packed["codes"], packed["scales"], strict=True):
            row, own = encode(np.array(x, dtype=float), packed["bits"], packed["form"], seed, stream)
            assert row.hex() == codes, packed["bits"]
            assert own.tobytes().hex() == scale


@pytest.mark.parametrize(("seed", "stream"), [(0, 0), (2**64 - 1, 1), (7, 5)])
def test_signs(seed: int, stream: int) -> None:
    assert rotation_signs(96, seed=seed, stream=stream).tolist() == signs(96, seed, stream).tolist()


def test_which_head_dims_there_are_and_from_what() -> None:
    for d in range(8, 1025, 8):
        assert (plan(d) is not None) == supported_order(d)
    table = re.findall(r"^\| `m` \|(.*)\|$", PAGE, flags=re.MULTILINE)[0].split("|")
    dims = re.findall(r"^\| D \|(.*)\|$", PAGE, flags=re.MULTILINE)[0].split("|")
    for row, cell in zip(dims, table, strict=True):
        m, *kind = cell.strip().split(", ")
        for d in numbers(row):
            found = plan(d)
            assert found is not None
            assert str(found[0]) == m
            assert found[1:] == ((kind[0], int(kind[1].split()[-1])) if kind else ("one", 1))


# 104 has a base of order 104 over a prime field and a smaller one over a field of 25 elements; the last two have bases
# over fields of 343 and 169 elements only.
@pytest.mark.parametrize("d", [8, 24, 56, 104, 144, 200, 304, 344, 680])
def test_matrices(d: int) -> None:
    np.testing.assert_array_equal(hadamard(d), hadamard_matrix(d))


@pytest.mark.parametrize("case", json.loads(trellis_text())["cases"], ids=lambda case: str(case["head_dim"]))
def test_trellis_rows(case: dict[str, Any]) -> None:
    d = case["head_dim"]
    for packed in case["packed"]:
        bits, (masks, table, step) = packed["bits"], TRELLIS[packed["bits"]]
        rows = np.array([list(bytes.fromhex(row)) for row in packed["codes"]], dtype=np.uint8)
        planes = np.unpackbits(rows, axis=-1, bitorder="little").reshape(len(rows), bits, d)
        level = mirrored(table, step).astype(np.float32)
        decoded = []
        for u, free, scale in zip(planes[:, 0], planes[:, 1:], packed["scales"], strict=True):
            f = sum(free[plane].astype(int) << plane for plane in range(bits - 1))
            w = [sum(int(u[(i - j) % d]) << j for j in range(9)) for i in range(d)]
            z = [sum((window & mask).bit_count() % 2 << k for k, mask in enumerate(masks)) for window in w]
            rotated = level[8 * f + np.array(z)] * scale
            decoded.append(signs(d, case["seed"], 0) * (hadamard(d).T @ rotated) / np.sqrt(d))
        quantizer = TurboQuantTrellis(d, bits, seed=case["seed"])
        expected = quantizer.decode(quantizer.encode(torch.tensor(case["vectors"]).float()))
        np.testing.assert_allclose(np.array(decoded), expected.numpy(), atol=1e-4)


@pytest.mark.parametrize("value_bits", [3, 2.5, None])
def test_pages(value_bits: float | None) -> None:
    """Chunks put together from rows and scales in the order of the page's table, page and slot by its sentences."""
    d, heads, page_size = 64, 2, 16
    value_layout = RawLayout(d, 4) if value_bits is None else VectorLayout(d, value_bits, "cubic")
    layout = PageLayout(VectorLayout(d, 4, "int8"), value_layout, page_size=page_size, kv_heads=heads)
    codec = CacheCodec.create(layout, key_scale="unbiased", value_scale="unbiased")
    generator = torch.Generator().manual_seed(1)
    key, value = (torch.randn(3, heads, d, generator=generator) for _ in range(2))
    slots = [3, 2 * page_size + 15, -1]
    pages = torch.zeros(layout.pages_shape(3), dtype=torch.uint8)
    ReferenceProvider().store(key, value, pages, torch.tensor(slots), codec)
    expected = np.zeros((3, heads, layout.chunk_bytes), dtype=np.uint8)
    for token, slot in enumerate(slots[:2]):
        for head in range(heads):
            fields = [(encode(key[token, head].double().numpy(), 4, "int8", 42, 0))]
            if value_bits is None:
                fields.append((value[token, head].numpy().tobytes(), None))
            else:
                fields.append(encode(value[token, head].double().numpy(), value_bits, "cubic", 42, 1))
            entries = [row for row, _ in fields] + [s.tobytes() for _, s in fields if s is not None]
            start = 0
            for entry in entries:
                at = start + slot % page_size * len(entry)
                expected[slot // page_size, head, at : at + len(entry)] = list(entry)
                start += page_size * len(entry)
    np.testing.assert_array_equal(pages.numpy(), expected)
