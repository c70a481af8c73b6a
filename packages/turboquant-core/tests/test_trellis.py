"""Trellis codes: error, bytes, decoding without recursion, the search, bad input."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from turboquant_core import LayoutError, Packed, TurboQuantMSE, format_codebook, rotate, rotation_signs, unrotate
from turboquant_core.scale import ScaleRule
from turboquant_core.trellis import TRELLIS_BITS, TrellisLayout, TurboQuantTrellis, trellis_code, trellis_constants
from turboquant_core.trellis.code import MEMORY, TrellisCode
from turboquant_core.trellis.golden import document, golden_text
from turboquant_core.trellis.layout import pack_planes, unpack_planes
from turboquant_core.trellis.optimise import (
    VECTORS,
    gaussian_vectors,
    mean_squared_error,
    retrained,
    search,
    to_int8,
    train,
)
from turboquant_core.trellis.quantizer import TRELLIS_RULES
from turboquant_core.trellis.viterbi import nearest_sequence

LIMIT = {2: 0.080, 3: 0.0215}
"""The error that the code exists for; 0.1175 and 0.0345 with one level per coordinate."""


def gaussian(n: int, head_dim: int = 128, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, head_dim, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", TRELLIS_BITS)
def test_error_on_a_gaussian_source(bits: int) -> None:
    """All bits counted: the row has ``bits`` bits a coordinate, the scale is the one that every codec here stores."""
    x = gaussian(1500)
    quantizer = TurboQuantTrellis(128, bits)
    packed = quantizer.encode(x)
    assert packed.nbytes == 1500 * (128 * bits // 8 + 2)
    error = float((quantizer.decode(packed) - x).square().mean())
    assert error < 0.93 * LIMIT[bits]
    assert error < 0.64 * format_codebook("int8", bits).mse


@pytest.mark.parametrize("bits", TRELLIS_BITS)
def test_error_of_the_levels_alone(bits: int) -> None:
    assert mean_squared_error(gaussian_vectors(1000, 5), trellis_code(bits)) < LIMIT[bits]


@pytest.mark.parametrize(("head_dim", "bits"), list(product((32, 64, 80, 256), TRELLIS_BITS)))
def test_other_head_dims(head_dim: int, bits: int) -> None:
    x = gaussian(300, head_dim)
    trellis, scalar = TurboQuantTrellis(head_dim, bits), TurboQuantMSE(head_dim, bits)
    error = (trellis.decode(trellis.encode(x)) - x).square().mean()
    assert error < 0.8 * (scalar.decode(scalar.encode(x)) - x).square().mean()


def expected_vector(row: bytes, scale: float, bits: int, signs: torch.Tensor) -> torch.Tensor:
    """Decode one row from the words of docs/layout.md, one coordinate at a time."""
    d, data = len(signs), json.loads((DATA / "trellis.json").read_text())[str(bits)]

    def bit(plane: int, i: int) -> int:
        return (row[plane * d // 8 + i // 8] >> (i % 8)) & 1

    levels = []
    for i in range(d):
        window = sum(bit(0, (i - j) % d) << j for j in range(9))
        index = sum((bin(window & mask).count("1") % 2) << k for k, mask in enumerate(data["masks"]))
        index += 8 * sum(bit(1 + plane, i) << plane for plane in range(bits - 1))
        half = len(data["q"])
        q = data["q"][index - half] if index >= half else data["q"][half - 1 - index]
        levels.append((q + 0.5) * data["step"] * (1 if index >= half else -1))
    return unrotate(scale * torch.tensor(levels), signs)


DATA = Path(__import__("turboquant_core").__file__).parent / "trellis" / "data"


@pytest.mark.parametrize(("head_dim", "bits"), list(product((32, 64, 112), TRELLIS_BITS)))
def test_every_bit_is_where_the_layout_says(head_dim: int, bits: int) -> None:
    quantizer = TurboQuantTrellis(head_dim, bits, seed=7)
    generator = torch.Generator().manual_seed(head_dim + bits)
    rows = torch.randint(0, 256, (3, quantizer.layout.code_bytes), dtype=torch.uint8, generator=generator)
    packed = quantizer.encode(gaussian(3, head_dim))
    scales = packed.packed.scales
    got = quantizer.decode(type(packed)(Packed(rows, scales), packed.coding, torch.float32))
    for row, scale, vector in zip(rows, scales.tolist(), got, strict=True):
        expected = expected_vector(bytes(row.tolist()), scale, bits, rotation_signs(head_dim, seed=7))
        torch.testing.assert_close(vector, expected, rtol=1e-5, atol=1e-5)


@settings(deadline=None)
@given(lead=st.lists(st.integers(1, 3), max_size=2), bits=st.sampled_from(TRELLIS_BITS), seed=st.integers(0, 2**31))
def test_unpack_inverts_pack_for_any_bytes(lead: list[int], bits: int, seed: int) -> None:
    layout = TrellisLayout(64, bits)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, 256, (*lead, layout.code_bytes), dtype=torch.uint8, generator=generator)
    path, free = unpack_planes(rows, layout)
    assert path.shape == free.shape == (*lead, 64)
    assert int(free.max()) < 1 << (bits - 1)
    assert torch.equal(pack_planes(path, free, layout), rows)


@settings(deadline=None, max_examples=8)
@given(bits=st.sampled_from(TRELLIS_BITS), seed=st.integers(0, 1000))
def test_no_single_change_of_a_row_brings_it_closer(bits: int, seed: int) -> None:
    """The search found a minimum: no other free bit, no shift of one path bit has a smaller error."""
    x, code = gaussian(1, 32, seed), trellis_code(bits)
    path, free = nearest_sequence(x, code)
    levels = code.levels()

    def error(path: torch.Tensor, free: torch.Tensor) -> float:
        return float((x - levels[free, code.subset_of(path)]).square().sum())

    best = error(path, free)
    for i in range(32):
        for change in range(1, 1 << (bits - 1)):
            other = free.clone()
            other[0, i] ^= change
            assert error(path, other) >= best - 1e-5
        flipped = path.clone()
        flipped[0, i] ^= 1
        own = levels.T[code.subset_of(flipped)]
        nearest = (x.unsqueeze(-1) - own).square().argmin(-1)
        # The state at the start is decided before the search, so paths through another start are not compared.
        if i < 32 - MEMORY:
            assert error(flipped, nearest) >= best - 1e-5


@pytest.mark.parametrize("bits", TRELLIS_BITS)
def test_search_against_every_path(bits: int) -> None:
    """Of 16 coordinates all 65536 paths can be tried: none from the same start state is better."""
    code, x = trellis_code(bits), gaussian(12, 16, seed=4)
    paths = (torch.arange(1 << 16).unsqueeze(-1) >> torch.arange(16)) & 1
    subsets = code.subset_of(paths)
    nearest = (x[:, :, None, None] - code.levels()).square().amin(2)
    path, free = nearest_sequence(x, code)
    found = (x - code.levels()[free, code.subset_of(path)]).square().sum(-1)
    for own, error, taken in zip(nearest, found, path, strict=True):
        same_start = (paths[:, -MEMORY:] == taken[-MEMORY:]).all(-1)
        best = own[torch.arange(16), subsets[same_start]].sum(-1).amin()
        torch.testing.assert_close(error, best, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", TRELLIS_RULES)
def test_scale_rules(rule: ScaleRule) -> None:
    x = gaussian(200, 64) * 3
    quantizer = TurboQuantTrellis(64, 2, scale_rule=rule)
    decoded = quantizer.decode(quantizer.encode(x))
    aligned = (decoded * x).sum(-1) / x.square().sum(-1)
    power = decoded.norm(dim=-1) / x.norm(dim=-1)
    if rule == "unbiased":
        torch.testing.assert_close(aligned, torch.ones(200), rtol=2e-3, atol=0)
    if rule == "renorm":
        torch.testing.assert_close(power, torch.ones(200), rtol=2e-3, atol=0)
    if rule == "least_squares":
        torch.testing.assert_close(aligned, power.square(), rtol=2e-3, atol=0)
    if rule == "norm":
        scale = quantizer.encode(x).packed.scales.float()
        torch.testing.assert_close(scale, x.norm(dim=-1) / 8, rtol=2e-3, atol=0)


def test_centre_and_scores() -> None:
    x = gaussian(40, 64).view(20, 2, 64)
    center = torch.randn(2, 64, generator=torch.Generator().manual_seed(3)) * 9
    plain, centred = TurboQuantTrellis(64, 3), TurboQuantTrellis(64, 3, center=center)
    moved = centred.decode(centred.encode(x + center))
    torch.testing.assert_close(moved, plain.decode(plain.encode(x)) + center, rtol=1e-3, atol=2e-2)
    query = gaussian(5, 64, seed=9)
    keys = plain.encode(x[:, 0])
    expected = 0.125 * query @ plain.decode(keys).T
    torch.testing.assert_close(plain.scores(query, keys, scaling=0.125), expected, rtol=1e-4, atol=1e-4)


def test_zero_nan_and_huge_vectors() -> None:
    x = gaussian(6, 64)
    quantizer = TurboQuantTrellis(64, 2)
    plain = quantizer.encode(x).packed
    x[1], x[2, 3], x[3, 0], x[4] = 0, torch.nan, -torch.inf, torch.finfo(torch.float32).max
    got = quantizer.encode(x)
    assert got.packed.scales[1] == 0
    assert got.packed.scales[2:4].isnan().all()
    assert not got.packed.codes[2:4].any()
    assert got.packed.scales[4].isfinite()
    for untouched in (0, 5):
        assert torch.equal(got.packed.codes[untouched], plain.codes[untouched])
    decoded = quantizer.decode(got)
    assert not decoded[1].any()
    assert decoded[2:4].isnan().all()


@pytest.mark.parametrize("lead", [(), (0,), (2, 0), (3, 2)])
def test_shapes_and_dtypes(lead: tuple[int, ...]) -> None:
    x = torch.ones(*lead, 64, dtype=torch.bfloat16)
    quantizer = TurboQuantTrellis(64, 3)
    packed = quantizer.encode(x)
    assert packed.shape == x.shape
    assert quantizer.decode(packed).shape == x.shape
    assert quantizer.decode(packed).dtype == torch.bfloat16


@pytest.mark.parametrize("bits", TRELLIS_BITS)
def test_shipped_levels_are_where_training_stops(bits: int) -> None:
    """One more round over the training vectors leaves every level near where it is."""
    code = trellis_code(bits)
    again = retrained(code, gaussian_vectors(VECTORS, bits))
    step = trellis_constants(bits).step
    # A quarter of a step of rounding, and what the last rounds still moved.
    assert max(abs(a - b) for a, b in zip(code.values, again.values, strict=True)) < 1.2 * step
    assert to_int8(code.values).q == trellis_constants(bits).q


def test_training_and_search_are_reproducible() -> None:
    masks, x = trellis_code(2).masks, gaussian_vectors(64, 1)
    first, second = train(2, masks, x, 2), train(2, masks, x, 2)
    assert first == second
    assert mean_squared_error(x, first) < mean_squared_error(x, train(2, masks, x, 0))
    assert search(2, 3, seed=1, vectors=16) == search(2, 3, seed=1, vectors=16)


@pytest.mark.parametrize("bits", TRELLIS_BITS)
def test_negated_vectors_have_negated_levels(bits: int) -> None:
    """All masks have odd weight and the levels are symmetric: the complement of every bit negates every level."""
    code = trellis_code(bits)
    assert list(code.values) == [-level for level in reversed(code.values)]
    path = torch.randint(0, 2, (4, 32), generator=torch.Generator().manual_seed(1))
    free = torch.randint(0, 1 << (bits - 1), (4, 32), generator=torch.Generator().manual_seed(2))
    levels = code.levels()
    flipped = levels[(1 << (bits - 1)) - 1 - free, code.subset_of(1 - path)]
    assert torch.equal(flipped, -levels[free, code.subset_of(path)])


def test_golden_bytes() -> None:
    assert document() == golden_text()


@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"stream": 1}, {"bits": 3}, {"center": None}, {"center": torch.ones(2, 64)}]
)
def test_vectors_of_another_quantizer(other: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"head_dim": 64, "bits": 2, "center": torch.zeros(2, 64)}
    packed = TurboQuantTrellis(**arguments | other).encode(torch.zeros(1, 2, 64))
    quantizer = TurboQuantTrellis(**arguments)
    for use in (quantizer.decode, lambda x: quantizer.scores(torch.zeros(1, 1, 64), x, scaling=1.0)):
        with pytest.raises(ValueError, match="these vectors were packed with"):
            use(packed)
    assert TurboQuantTrellis(**arguments, scale_rule="norm").decode(quantizer.encode(torch.zeros(1, 2, 64))) is not None


def bad(**changes: Any) -> Any:
    return lambda: TurboQuantTrellis(**{"head_dim": 64, "bits": 2, **changes})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (bad(bits=4), r"bits is 4; trellis codes have \(2, 3\): choose one of them"),
        (bad(bits=2.5), "bits is 2.5"),
        (bad(bits=2.0), "bits is 2.0"),
        (bad(bits=True), "bits is True"),
        (bad(head_dim=64.0), "head_dim is 64.0; it must be an integer"),
        (bad(head_dim=16), "head_dim is 16; trellis codes take multiples of 8 from 32 to 1024"),
        (bad(head_dim=184), "184"),
        (lambda: TrellisLayout(64, 2, version=2), "trellis version is 2; this release reads 1"),
        (lambda: trellis_code(5), "bits is 5"),
        (lambda: (trellis_code(2), trellis_code(2.0)), "bits is 2.0"),
    ],
)
def test_layouts_that_do_not_exist(call: Any, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (bad(scale_rule="best"), "'best'"),
        (bad(scale_rule="searched"), "choose one of unbiased, least_squares, renorm, norm$"),
        (bad(center=torch.zeros(64)), "center is"),
        (lambda: TurboQuantTrellis(64, 2).encode(torch.zeros(2, 32)), "head_dim = 64"),
        (lambda: TurboQuantTrellis(64, 2).encode(torch.zeros(2, 64, dtype=torch.int32)), "int32"),
        (lambda: TurboQuantTrellis(64, 2).encode(torch.zeros(2, 64, device="meta")), "is on meta"),
        (lambda: TurboQuantTrellis(64, 3).decode(TurboQuantTrellis(64, 2).encode(torch.zeros(2, 64))), "bits=3"),
        (lambda: unpack_planes(torch.zeros(2, 8, dtype=torch.uint8), TrellisLayout(64, 2)), "trellis rows are"),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_rotation_is_that_of_the_packed_format() -> None:
    x = gaussian(4, 64)
    quantizer = TurboQuantTrellis(64, 3, seed=5, stream=1)
    estimate = rotate(quantizer.decode(quantizer.encode(x)), rotation_signs(64, seed=5, stream=1))
    assert isinstance(trellis_code(3), TrellisCode)
    z = rotate(x, rotation_signs(64, seed=5, stream=1))
    assert float((estimate - z).square().sum() / z.square().sum()) < 0.03
