# mypy: ignore-errors
# ruff: noqa: E741, RUF005 -- l as in the shapes; Triton knows no starred tuples
"""The pass of the kernel for GPUs over one batch, in Triton: of units and of entries.

Layer 1: Triton alone; only to be imported where that is installed. Each program takes a run of entries and a few units,
and reads them twice while they are near: first for counts, extremes and means, then for everything around them. Sums of
a program are its own, so that nothing depends on the order in which programs run; `triton_fold` adds them up.

It waits for memory more than it computes: several tiles are read before the first is used, into the same sums, and few
registers are taken, so that more programs are at work at once.

Shapes: L entries, S positions, U units, G groups, R runs of entries, B bins, F forms of match; tiles are (l, s, u).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from pipeline.kernels.triton_tile import (
    BIN_ROOM,
    EMPTY_TOP,
    LAST,
    MAGNITUDE,
    MATCH_BINS,
    RECTIFIED,
    SAME,
    binned,
    extended,
    extremes,
    greater_of,
    greatest_of,
    lattice,
    loaded,
    matched,
    of_units,
    over_entries,
    summed,
    z_bin,
)


class Parts(NamedTuple):
    """What each run comes to: counts (R, 4, U); min, max, Σ|v|, mean, m2, m3, m4 of z and a (R, 7, U); the end of the
    window (R, U) and bins (R, U, BIN_ROOM) of z; n, mean, m2 (R, F, 2·3, U) of both matches, of the silent, then of the
    firing. Their bins (C, F, U, 2·B) are shared by runs.
    """

    count: Any
    z: Any
    a: Any
    top: Any
    bins: Any
    match_bins: Any
    match: Any


class Found(NamedTuple):
    """Of each entry and unit the greatest z, −z and match, and the index of their position; the greatest a: (L, U)."""

    greatest: Any
    greatest_at: Any
    least: Any
    least_at: Any
    best: Any
    best_at: Any
    output: Any


@triton.jit
def _mean(n, total, low, high):
    """The mean; of equal numbers it is that number, whatever the sum rounds to."""
    mean = tl.minimum(tl.maximum(total / tl.maximum(n, 1).to(tl.float64), low), high)
    return tl.where(n > 0, mean, 0)


@triton.jit
def _store(at, units, inside, first, second, third, fourth):
    tl.store(at, first, mask=inside)
    tl.store(at + units, second, mask=inside)
    tl.store(at + 2 * units, third, mask=inside)
    tl.store(at + 3 * units, fourth, mask=inside)


@triton.jit
def _store_means(at, units, inside, n_silent, n_fired, mean_silent, mean_fired):
    tl.store(at, n_silent.to(tl.float64), mask=inside)
    tl.store(at + units, mean_silent, mask=inside)
    tl.store(at + 3 * units, n_fired.to(tl.float64), mask=inside)
    tl.store(at + 4 * units, mean_fired, mask=inside)


@triton.jit
def _sides(tile_l, tile_s, unit_u, units):
    """Entries, positions and units of a tile that begins at 0, as (l, s, u) each, and which units there are."""
    l = tl.expand_dims(tl.expand_dims(tile_l, 1), 1)
    s = tl.expand_dims(tl.expand_dims(tile_s, 0), 2)
    return l, s, of_units(unit_u), of_units(unit_u < units)


@triton.jit
def _tile(
    memory, by, lengths, e0, s0, l, s, u, of_unit, last, positions, per_group, groups,
    A_IS: tl.constexpr, HAS_Y: tl.constexpr, HAS_MASK: tl.constexpr, PEARSON: tl.constexpr, COSINE: tl.constexpr,
):  # fmt: skip
    """The tile whose first entry and position are e0 and s0: what `loaded` gives, then the sums over x of `Lengths`."""
    inside = (l < (last - e0).to(tl.int32)) & (s < (positions - s0).to(tl.int32)) & of_unit
    z, a, y, shown, valid = loaded(memory, by, e0, s0, l, s, u, inside, A_IS, HAS_Y, HAS_MASK)
    total, pearson, cosine = z, z, z
    if PEARSON or COSINE:
        first = (e0 * positions + s0) * groups
        at = (l * positions + s) * groups + u // per_group
    if PEARSON:
        total = tl.load(lengths.total + first + at, mask=inside, other=0)
        pearson = tl.load(lengths.pearson + first + at, mask=inside, other=0)
    if COSINE:
        cosine = tl.load(lengths.cosine + first + at, mask=inside, other=0)
    return z, a, y, shown, valid, total, pearson, cosine


@triton.jit
def _wide(z, a, valid, A_IS: tl.constexpr):
    """z and a in float64, 0 where they do not count."""
    wide_z = tl.where(valid, z, 0).to(tl.float64)
    wide_a = wide_z
    if A_IS == RECTIFIED:
        wide_a = tl.where(z > 0, wide_z, 0)
    elif A_IS != SAME:
        wide_a = tl.where(valid, a, 0).to(tl.float64)
    return wide_z, wide_a


@triton.jit
def _survey(
    memory, by, lengths, patterns, parts, run, first, last, unit_u, positions, units, per_group, groups,
    A_IS: tl.constexpr, HAS_Y: tl.constexpr, HAS_MASK: tl.constexpr, PEARSON: tl.constexpr, COSINE: tl.constexpr,
    BL: tl.constexpr, BS: tl.constexpr, BU: tl.constexpr, AHEAD: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    """Store a run's counts, extremes, windows and means; give its windows and means."""
    # at each place of the tile: to put them together within the loop would take most of its time
    none = tl.zeros([BL, BS, BU], tl.int32)
    n, nonfinite, zeros, firing, top = none, none, none, none, none + EMPTY_TOP
    p_n0, p_n1, c_n0, c_n1 = none, none, none, none
    nothing, extreme = tl.zeros([BL, BS, BU], tl.float64), tl.zeros([BL, BS, BU], tl.float32) + float("inf")
    z_sum, z_absolute, z_low, z_high = nothing, nothing, extreme, -extreme
    a_sum, a_absolute, a_low, a_high = nothing, nothing, extreme, -extreme
    p_sum0, p_sum1, c_sum0, c_sum1 = nothing, nothing, nothing, nothing
    l, s, u, of_unit = _sides(tl.arange(0, BL), tl.arange(0, BS), unit_u, units)
    bias = tl.load(patterns.bias + u, mask=of_unit, other=0)
    mean_w = tl.load(patterns.mean + u, mask=of_unit, other=0)
    pearson_w = tl.load(patterns.pearson + u, mask=of_unit, other=0)
    cosine_w = tl.load(patterns.cosine + u, mask=of_unit, other=0)
    for e0 in range(first, last, BL * AHEAD if ONCE else BL):
        for s0 in range(0, BS if ONCE else positions, BS if ONCE else BS * AHEAD):
            tiles = ()
            for k in tl.static_range(AHEAD):
                tiles = tiles + (
                    _tile(
                        memory, by, lengths, e0 + (k * BL if ONCE else 0), s0 + (0 if ONCE else k * BS),
                        l, s, u, of_unit, last, positions, per_group, groups,
                        A_IS, HAS_Y, HAS_MASK, PEARSON, COSINE,
                    ),
                )  # fmt: skip
            for k in tl.static_range(AHEAD):
                z, a, y, shown, valid, total, of_x, norm = tiles[k]
                bits = z.to(tl.int32, bitcast=True)
                n += valid.to(tl.int32)
                nonfinite += (shown & (valid == 0)).to(tl.int32)
                zeros += (valid & ((bits & MAGNITUDE) == 0)).to(tl.int32)
                firing += (valid & (bits > 0)).to(tl.int32)
                top = tl.maximum(top, tl.where(valid, lattice(z), EMPTY_TOP))
                wide_z, wide_a = _wide(z, a, valid, A_IS)
                z_sum, z_absolute, z_low, z_high = extended(z, wide_z, valid, z_sum, z_absolute, z_low, z_high)
                if A_IS != SAME:
                    a_sum, a_absolute, a_low, a_high = extended(a, wide_a, valid, a_sum, a_absolute, a_low, a_high)
                if PEARSON:
                    match, known = matched(y, valid, total, of_x, bias, mean_w, pearson_w, True)
                    p_n0, p_n1, p_sum0, p_sum1 = summed(match, known, bits > 0, p_n0, p_n1, p_sum0, p_sum1)
                if COSINE:
                    match, known = matched(y, valid, norm, norm, bias, mean_w, cosine_w, False)
                    c_n0, c_n1, c_sum0, c_sum1 = summed(match, known, bits > 0, c_n0, c_n1, c_sum0, c_sum1)
    n, nonfinite = over_entries(n), over_entries(nonfinite)
    zeros, firing, top = over_entries(zeros), over_entries(firing), tl.max(tl.max(top, axis=1), axis=0)
    z_sum, z_absolute = over_entries(z_sum), over_entries(z_absolute)
    z_low, z_high = extremes(z_low, z_high)
    a_sum, a_absolute = over_entries(a_sum), over_entries(a_absolute)
    a_low, a_high = extremes(a_low, a_high)
    p_n0, p_n1, p_sum0, p_sum1 = over_entries(p_n0), over_entries(p_n1), over_entries(p_sum0), over_entries(p_sum1)
    c_n0, c_n1, c_sum0, c_sum1 = over_entries(c_n0), over_entries(c_n1), over_entries(c_sum0), over_entries(c_sum1)
    z_mean, a_mean = _mean(n, z_sum, z_low, z_high), _mean(n, a_sum, a_low, a_high)
    p_mean0, p_mean1 = p_sum0 / tl.maximum(p_n0, 1).to(tl.float64), p_sum1 / tl.maximum(p_n1, 1).to(tl.float64)
    c_mean0, c_mean1 = c_sum0 / tl.maximum(c_n0, 1).to(tl.float64), c_sum1 / tl.maximum(c_n1, 1).to(tl.float64)
    known_u = unit_u < units
    tl.store(parts.top + run * units + unit_u, top, mask=known_u)
    _store(parts.count + run * 4 * units + unit_u, units, known_u, n, nonfinite, zeros, firing)
    _store(parts.z + run * 7 * units + unit_u, units, known_u, z_low, z_high, z_absolute, z_mean)
    if A_IS != SAME:
        _store(parts.a + run * 7 * units + unit_u, units, known_u, a_low, a_high, a_absolute, a_mean)
    own = parts.match + run * 12 * units + unit_u
    if PEARSON:
        _store_means(own, units, known_u, p_n0, p_n1, p_mean0, p_mean1)
    if COSINE:
        _store_means(own + 6 * units, units, known_u, c_n0, c_n1, c_mean0, c_mean1)
    return top, z_mean, a_mean, p_mean0, p_mean1, c_mean0, c_mean1


@triton.jit
def _powers(wide, valid, mean, m2, m3, m4):
    """Σ(v − v̄)² to Σ(v − v̄)⁴ with a tile more, at each place of the tile."""
    rest = tl.where(valid, wide - of_units(mean), 0)
    square = rest * rest
    return m2 + square, m3 + square * rest, m4 + square * square


@triton.jit
def _store_found(at, place_at, best, index, number, where, inside, HAS_NUMBER: tl.constexpr):
    of_row, place = greatest_of(best, index, number, HAS_NUMBER)
    tl.store(at + where, of_row, mask=inside)
    tl.store(place_at + where, place, mask=inside)


@triton.jit
def _store_entries(
    found, e0, last, unit_u, units, greatest, greatest_at, greatest_number, least, least_at, least_number,
    best, best_at, best_number, output,
    HAS_NUMBER: tl.constexpr, LEAST: tl.constexpr, BEST: tl.constexpr, OUTPUT: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    """Store the extremes of the entries of a tile."""
    l = tl.expand_dims(tl.arange(0, BL), 1)
    at = (e0 + l) * units + tl.expand_dims(unit_u, 0)
    inside = (l < (last - e0).to(tl.int32)) & tl.expand_dims(unit_u < units, 0)
    _store_found(found.greatest, found.greatest_at, greatest, greatest_at, greatest_number, at, inside, HAS_NUMBER)
    if LEAST:
        _store_found(found.least, found.least_at, least, least_at, least_number, at, inside, HAS_NUMBER)
    if BEST:
        _store_found(found.best, found.best_at, best, best_at, best_number, at, inside, HAS_NUMBER)
    if OUTPUT:
        tl.store(found.output + at, tl.max(output, axis=1), mask=inside)


@triton.jit(do_not_specialize=["entries", "positions", "units", "per_group", "groups", "blocks", "copies"])
def observe(
    memory, by, lengths, patterns, parts, found, entries, positions, units, per_group, groups, blocks, copies,
    A_IS: tl.constexpr, HAS_Y: tl.constexpr, HAS_MASK: tl.constexpr, HAS_NUMBER: tl.constexpr,
    BINS: tl.constexpr, PEARSON: tl.constexpr, COSINE: tl.constexpr, LEAST: tl.constexpr, BEST: tl.constexpr,
    OUTPUT: tl.constexpr, BL: tl.constexpr, BS: tl.constexpr, BU: tl.constexpr, AHEAD: tl.constexpr,
    ONCE: tl.constexpr,
):  # fmt: skip
    """Everything of a run of `blocks` · BL entries and of BU units.

    Takes `Shown`, its strides, `Lengths`, `Patterns`, `Parts` whose bins are 0, and `Found`. AHEAD tiles are read at
    once: of entries if a tile has all positions (ONCE), else of positions.
    """
    run = tl.program_id(1).to(tl.int64)
    unit_u = tl.program_id(0) * BU + tl.arange(0, BU)
    # where something is may take 64 bits
    first, positions = run * blocks * BL, positions.to(tl.int64)
    last = tl.minimum(first + blocks * BL, entries)
    top, z_mean, a_mean, p_mean0, p_mean1, c_mean0, c_mean1 = _survey(
        memory, by, lengths, patterns, parts, run, first, last, unit_u, positions, units, per_group, groups,
        A_IS, HAS_Y, HAS_MASK, PEARSON, COSINE, BL, BS, BU, AHEAD, ONCE,
    )  # fmt: skip
    nothing = tl.zeros([BL, BS, BU], tl.float64)
    z_m2, z_m3, z_m4, a_m2, a_m3, a_m4 = nothing, nothing, nothing, nothing, nothing, nothing
    p_m20, p_m21, c_m20, c_m21 = nothing, nothing, nothing, nothing
    lowest, no_place = tl.zeros([BL, BS, BU], tl.float32) - float("inf"), tl.zeros([BL, BS, BU], tl.int32)
    no_number = no_place.to(tl.int64) + LAST
    l, s, u, of_unit = _sides(tl.arange(0, BL), tl.arange(0, BS), unit_u, units)
    bias = tl.load(patterns.bias + u, mask=of_unit, other=0)
    mean_w = tl.load(patterns.mean + u, mask=of_unit, other=0)
    pearson_w = tl.load(patterns.pearson + u, mask=of_unit, other=0)
    cosine_w = tl.load(patterns.cosine + u, mask=of_unit, other=0)
    own = run * units + u.to(tl.int64)
    bins = parts.bins + own * BIN_ROOM
    match_bins = parts.match_bins + (run % copies * 2 * units + u) * (2 * MATCH_BINS)
    of_form = match_bins + units * (2 * MATCH_BINS)
    for e0 in range(first, last, BL * AHEAD if ONCE else BL):
        greatest, greatest_at, greatest_number = lowest, no_place, no_number
        least, least_at, least_number = lowest, no_place, no_number
        best, best_at, best_number = lowest.to(tl.float64), no_place, no_number
        output = lowest
        for s0 in range(0, BS if ONCE else positions, BS if ONCE else BS * AHEAD):
            tiles = ()
            for k in tl.static_range(AHEAD):
                tiles = tiles + (
                    _tile(
                        memory, by, lengths, e0 + (k * BL if ONCE else 0), s0 + (0 if ONCE else k * BS),
                        l, s, u, of_unit, last, positions, per_group, groups,
                        A_IS, HAS_Y, HAS_MASK, PEARSON or BEST, COSINE,
                    ),
                )  # fmt: skip
            for k in tl.static_range(AHEAD):
                z, a, y, _shown, valid, total, of_x, norm = tiles[k]
                wide_z, wide_a = _wide(z, a, valid, A_IS)
                z_m2, z_m3, z_m4 = _powers(wide_z, valid, z_mean, z_m2, z_m3, z_m4)
                if A_IS != SAME:
                    a_m2, a_m3, a_m4 = _powers(wide_a, valid, a_mean, a_m2, a_m3, a_m4)
                if BINS:
                    tl.atomic_add(bins + z_bin(z, of_units(top)), 1, mask=valid, sem="relaxed")
                e_k, s_k = e0 + (k * BL if ONCE else 0), s0 + (0 if ONCE else k * BS)
                index = (s_k + s).to(tl.int32)
                number = index
                if HAS_NUMBER:
                    at = e_k * by.number[0] + s_k * by.number[1]
                    near = l.to(tl.int64) * by.number[0] + s.to(tl.int64) * by.number[1]
                    known = (l < (last - e_k).to(tl.int32)) & (s < (positions - s_k).to(tl.int32))
                    number = tl.load(memory.number + at + near, mask=known, other=0)
                if ONCE:
                    greatest, greatest_at, greatest_number = lowest, no_place, no_number
                    least, least_at, least_number = lowest, no_place, no_number
                    best, best_at, best_number = lowest.to(tl.float64), no_place, no_number
                    output = lowest
                greatest, greatest_at, greatest_number = greater_of(
                    z, valid, index, number, greatest, greatest_at, greatest_number, HAS_NUMBER
                )
                if LEAST:
                    least, least_at, least_number = greater_of(
                        -z, valid, index, number, least, least_at, least_number, HAS_NUMBER
                    )
                if OUTPUT:
                    output = tl.maximum(output, tl.where(valid, a, float("-inf")))
                fired = z.to(tl.int32, bitcast=True) > 0
                if PEARSON or BEST:
                    match, known = matched(y, valid, total, of_x, bias, mean_w, pearson_w, True)
                    if PEARSON:
                        p_m20, p_m21 = binned(match, known, fired, p_mean0, p_mean1, p_m20, p_m21, match_bins)
                    if BEST:
                        best, best_at, best_number = greater_of(
                            match, known, index, number, best, best_at, best_number, HAS_NUMBER
                        )
                if COSINE:
                    match, known = matched(y, valid, norm, norm, bias, mean_w, cosine_w, False)
                    c_m20, c_m21 = binned(match, known, fired, c_mean0, c_mean1, c_m20, c_m21, of_form)
                if ONCE:
                    _store_entries(
                        found, e_k, last, unit_u, units, greatest, greatest_at, greatest_number,
                        least, least_at, least_number, best, best_at, best_number, output,
                        HAS_NUMBER, LEAST, BEST, OUTPUT, BL,
                    )  # fmt: skip
        if not ONCE:
            _store_entries(
                found, e0, last, unit_u, units, greatest, greatest_at, greatest_number,
                least, least_at, least_number, best, best_at, best_number, output,
                HAS_NUMBER, LEAST, BEST, OUTPUT, BL,
            )  # fmt: skip
    _store_rest(
        parts, run, units, unit_u, z_m2, z_m3, z_m4, a_m2, a_m3, a_m4, p_m20, p_m21, c_m20, c_m21, A_IS, PEARSON, COSINE
    )


@triton.jit
def _store_rest(
    parts, run, units, unit_u, z_m2, z_m3, z_m4, a_m2, a_m3, a_m4, p_m20, p_m21, c_m20, c_m21,
    A_IS: tl.constexpr, PEARSON: tl.constexpr, COSINE: tl.constexpr,
):  # fmt: skip
    of_unit = unit_u < units
    of_z = parts.z + (run * 7 + 4) * units + unit_u
    tl.store(of_z, over_entries(z_m2), mask=of_unit)
    tl.store(of_z + units, over_entries(z_m3), mask=of_unit)
    tl.store(of_z + 2 * units, over_entries(z_m4), mask=of_unit)
    if A_IS != SAME:
        of_a = parts.a + (run * 7 + 4) * units + unit_u
        tl.store(of_a, over_entries(a_m2), mask=of_unit)
        tl.store(of_a + units, over_entries(a_m3), mask=of_unit)
        tl.store(of_a + 2 * units, over_entries(a_m4), mask=of_unit)
    own = parts.match + run * 12 * units + unit_u
    if PEARSON:
        tl.store(own + 2 * units, over_entries(p_m20), mask=of_unit)
        tl.store(own + 5 * units, over_entries(p_m21), mask=of_unit)
    if COSINE:
        tl.store(own + 8 * units, over_entries(c_m20), mask=of_unit)
        tl.store(own + 11 * units, over_entries(c_m21), mask=of_unit)
