"""The search of the scale rule ``searched`` (:mod:`turboquant_core.search`), without a look-up for every trial.

A coordinate times the multipliers of a group of trials crosses one boundary at most. Its cell gives that boundary
``b`` and half the step ``h`` between the levels beside it: the level is ``b - h`` up to some trial, then ``b + h``. So
a group shares ``<u, l>`` and ``|l|^2`` of the levels ``b - h``, and a trial adds ``2 h u`` and ``4 b h`` of what it
crosses.
"""

# A tuple that grows in an unrolled loop has another type in each iteration; Triton takes no annotation that says so.
# mypy: disable-error-code="assignment, var-annotated"

from __future__ import annotations

import triton
import triton.language as tl

from turboquant_core.scale import MULTIPLIERS

from .cells import boundary_reached, cell_of, look_up, pair, unpair
from .rotate import rotate_part
from .widths import code_fields

LEAST_MULTIPLIER = tl.constexpr(MULTIPLIERS[0])
MULTIPLIER_STEP = tl.constexpr(MULTIPLIERS[1] - MULTIPLIERS[0])
TRIALS = tl.constexpr(len(MULTIPLIERS))
# Times this, a float that is not on a boundary is further from it than 1.
SHARP = tl.constexpr(2.0**40)
LEAST_LANES = 4


@triton.constexpr_function
def group_count(bits):
    """Groups of trials: two where boundaries are too close for one."""
    return 2 if bits == 4 else 1


@triton.constexpr_function
def group_start(group, bits):
    """First trial of a group; of the group after the last, the number of trials."""
    return ((0, 3, TRIALS.value) if bits == 4 else (0, TRIALS.value))[group]


@triton.constexpr_function
def lanes(columns):
    """Columns of a piece: two of every eight columns of a product lie in one thread, 32 of them in one warp."""
    return max(columns // 8, LEAST_LANES)


@triton.constexpr_function
def halvings(columns):
    """How often columns halve until there are :func:`lanes`."""
    return (columns // lanes(columns)).bit_length() - 1


@triton.jit
def load_steps(boundaries, levels, multiplier, BITS: tl.constexpr):
    """``-SHARP b`` and ``h`` of the group whose least multiplier is given.

    Two scalars at 2 bits, else an entry (:func:`pair`) for each cell.
    """
    HALF: tl.constexpr = 1 << (BITS - 1)
    index = HALF
    if BITS > 2:
        index += boundary_reached(boundaries + HALF, multiplier, BITS)
    boundary = tl.load(boundaries + index) * -SHARP
    half = (tl.load(levels + index + 1) - tl.load(levels + index)) * 0.5
    if BITS == 2:
        return boundary, half
    else:
        return pair(boundary, half)


@triton.jit
def load_groups(boundaries, levels, BITS: tl.constexpr):
    """:func:`load_steps` of every group."""
    groups = ()
    for group in tl.static_range(group_count(BITS)):
        least = LEAST_MULTIPLIER + MULTIPLIER_STEP * group_start(group, BITS)
        groups += (load_steps(boundaries, levels, least, BITS),)
    return groups


@triton.jit
def steps_of(magnitude, steps, BITS: tl.constexpr):
    """``-SHARP b`` and ``h`` of each coordinate."""
    if BITS == 2:
        return tl.broadcast_to(steps[0], magnitude.shape), tl.broadcast_to(steps[1], magnitude.shape)
    else:
        boundary, half = unpair(look_up(steps, cell_of(magnitude, 3)))
        return boundary.to(tl.float32, bitcast=True), half.to(tl.float32, bitcast=True)


@triton.jit
def pieces_of(x):
    """``[rows, columns]`` in pieces ``[rows, lanes]``, one for each column of a product that a thread holds.

    Sums of products are then chains of fused multiply-adds, and shuffles wait until the end.
    """
    ROWS: tl.constexpr = x.shape[0]
    COLUMNS: tl.constexpr = x.shape[1]
    pieces = tl.split(tl.reshape(x, (ROWS, COLUMNS // 2, 2)))
    for level in tl.static_range(1, halvings(COLUMNS)):
        halves = ()
        for index in tl.static_range(1 << level):
            columns = tl.reshape(pieces[index], (ROWS, 2, COLUMNS >> (level + 1)))
            halves += tl.split(tl.permute(columns, (0, 2, 1)))
        pieces = halves
    return pieces


@triton.jit
def add_piece(sums, magnitude, boundary, half, level, START: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr):
    """The sums of a group, number ``START`` of all and on, with a piece of coordinates in them.

    ``<u, l>`` and ``|l|^2`` of the shared levels, then of each trial what it adds to these over 2 and ``-4 / SHARP``.
    """
    inner, power = magnitude * half, boundary * half
    added = (tl.fma(magnitude, level, sums[START]), tl.fma(level, level, sums[START + 1]))
    for trial in tl.static_range(FIRST, LAST):
        distance = tl.fma(magnitude, SHARP * (LEAST_MULTIPLIER + MULTIPLIER_STEP * trial), boundary)
        crossed = tl.minimum(tl.maximum(distance, 0.0), 1.0)
        inner_sum, power_sum = sums[START + 2 * (trial - FIRST) + 2], sums[START + 2 * (trial - FIRST) + 3]
        added += (tl.fma(crossed, inner, inner_sum), tl.fma(crossed, power, power_sum))
    return added


@triton.jit
def group_pieces(magnitude, present, steps, MASKED: tl.constexpr, BITS: tl.constexpr):
    """Pieces of ``-SHARP b``, of ``h`` and of the shared levels, which are 0 where not ``present``."""
    boundary, half = steps_of(magnitude, steps, BITS)
    level = tl.fma(boundary, -1 / SHARP, -half)
    if MASKED:
        level = tl.where(present, level, 0.0)
    return pieces_of(boundary), pieces_of(half), pieces_of(level)


@triton.jit
def add_part(sums, magnitude, present, groups, MASKED: tl.constexpr, BITS: tl.constexpr):
    """The sums (:func:`add_piece`) of all groups with coordinates ``[rows, columns]`` in them."""
    magnitudes = pieces_of(magnitude)
    pieces = ()
    for group in tl.static_range(group_count(BITS)):
        pieces += (group_pieces(magnitude, present, groups[group], MASKED, BITS),)
    for index in tl.static_range(magnitude.shape[1] // lanes(magnitude.shape[1])):
        added = ()
        for group in tl.static_range(group_count(BITS)):
            boundary, half, level = pieces[group]
            added += add_piece(
                sums, magnitudes[index], boundary[index], half[index], level[index],
                2 * (group_start(group, BITS) + group), group_start(group, BITS), group_start(group + 1, BITS),
            )  # fmt: skip
        sums = added
    return sums


@triton.jit
def trial_sums(sums, BITS: tl.constexpr):
    """``<u, l>`` and ``|l|^2`` ``[rows]`` of each trial in turn."""
    trials = ()
    for group in tl.static_range(group_count(BITS)):
        shared_inner = sums[2 * (group_start(group, BITS) + group)]
        shared_power = sums[2 * (group_start(group, BITS) + group) + 1]
        for trial in tl.static_range(group_start(group, BITS), group_start(group + 1, BITS)):
            inner = shared_inner + 2 * sums[2 * (trial + group) + 2]
            power = shared_power - 4 / SHARP * sums[2 * (trial + group) + 3]
            trials += (inner, power)
    return sums_of(trials)


@triton.jit
def sums_of(values):
    """Sums ``[rows]`` of each of ``[rows, lanes]``, four at a time: warps that share rows wait once for each four."""
    totals = ()
    FOURS: tl.constexpr = len(values) // 4
    for four in tl.static_range(FOURS):
        first = tl.join(values[4 * four], values[4 * four + 1])
        second = tl.join(values[4 * four + 2], values[4 * four + 3])
        left, right = tl.split(tl.sum(tl.join(first, second), 1))
        totals += tl.split(left) + tl.split(right)
    if len(values) % 4 == 2:
        totals += tl.split(tl.sum(tl.join(values[4 * FOURS], values[4 * FOURS + 1]), 1))
    return totals


@triton.jit
def search_sums(
    halves,
    matrix,
    normalize,
    boundaries,
    levels,
    position,
    D: tl.constexpr,
    SIZE: tl.constexpr,
    BITS: tl.constexpr,
    SPLIT: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """``<u, l>`` and ``|l|^2`` ``[rows]`` of each trial, ``l`` the levels nearest to multiples of a part's ``u``.

    A coordinate within rounding of a boundary may take either side.
    """
    ROWS: tl.constexpr = normalize.shape[0]
    POSITIONS: tl.constexpr = triton.next_power_of_2(SIZE)
    FIELDS: tl.constexpr = code_fields(BITS)
    groups = load_groups(boundaries, levels, BITS)
    present = (tl.arange(0, COLUMNS) % (POSITIONS // FIELDS) < SIZE // FIELDS)[None, :]
    sums = ()
    for _ in tl.static_range(2 * (TRIALS + group_count(BITS))):
        sums += (tl.zeros((ROWS, lanes(COLUMNS)), tl.float32),)
    for first in range(0, POSITIONS, COLUMNS):
        rotated = rotate_part(halves, matrix, position + first, D, SPLIT, COLUMNS) * normalize[:, None]
        sums = add_part(sums, tl.abs(rotated), present, groups, POSITIONS != SIZE, BITS)
    return trial_sums(sums, BITS)


@triton.jit
def both_sums(first, second):
    """Sums of the coordinates of two parts, trial by trial."""
    sums = ()
    for index in tl.static_range(2 * TRIALS):
        sums += (first[index] + second[index],)
    return sums


@triton.jit
def best_trial(sums):
    """Multiplier and ``<u, l>`` ``[rows]`` of the largest cosine, the first of equals, from :func:`search_sums`."""
    inner, power = sums[0], sums[1]
    multiplier = tl.full(inner.shape, LEAST_MULTIPLIER, tl.float32)
    for trial in tl.static_range(1, TRIALS):
        other, its = sums[2 * trial], sums[2 * trial + 1]
        better = other * other * power > inner * inner * its
        multiplier = tl.where(better, LEAST_MULTIPLIER + MULTIPLIER_STEP * trial, multiplier)
        inner, power = tl.where(better, other, inner), tl.where(better, its, power)
    return multiplier, inner
