# mypy: ignore-errors
"""The pass of the kernel for GPUs over one batch, in Triton: of units and of entries.

Layer 1: Triton alone; only to be imported where that is installed. Each program takes a run of entries and a few units,
and reads them twice while they are near: first for counts, extremes and means, then for everything around them. Sums of
a program are its own, so that nothing depends on the order in which programs run; `triton_fold` adds them up.

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
    window (R, U) and bins (R, U, BIN_ROOM) of z; bins (R, F, U, 2·B) and n, mean, m2 (R, F, 2·3, U) of both matches, of
    the silent, then of the firing.
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
def _survey(
    memory, by, lengths, patterns, parts, run, first, stop, unit_u, entries, positions, units, per_group, groups,
    A_IS: tl.constexpr, HAS_Y: tl.constexpr, HAS_MASK: tl.constexpr, PEARSON: tl.constexpr, COSINE: tl.constexpr,
    BL: tl.constexpr, BS: tl.constexpr, BU: tl.constexpr,
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
    of_unit = unit_u < units
    u = of_units(unit_u.to(tl.int64))
    bias = tl.load(patterns.bias + u, mask=of_units(of_unit), other=0)
    mean_w = tl.load(patterns.mean + u, mask=of_units(of_unit), other=0)
    pearson_w = tl.load(patterns.pearson + u, mask=of_units(of_unit), other=0)
    cosine_w = tl.load(patterns.cosine + u, mask=of_units(of_unit), other=0)
    for block in range(first, stop):
        e = tl.expand_dims(tl.expand_dims((block * BL + tl.arange(0, BL)).to(tl.int64), 1), 1)
        for begin in range(0, positions, BS):
            s = tl.expand_dims(tl.expand_dims((begin + tl.arange(0, BS)).to(tl.int64), 0), 2)
            inside = (e < entries) & (s < positions) & of_units(of_unit)
            z, a, y, shown, valid = loaded(memory, by, e, s, u, inside, A_IS, HAS_Y, HAS_MASK)
            bits = z.to(tl.int32, bitcast=True)
            n += valid.to(tl.int32)
            nonfinite += (shown & (valid == 0)).to(tl.int32)
            zeros += (valid & ((bits & MAGNITUDE) == 0)).to(tl.int32)
            firing += (valid & (bits > 0)).to(tl.int32)
            top = tl.maximum(top, tl.where(valid, lattice(z), EMPTY_TOP))
            z_sum, z_absolute, z_low, z_high = extended(z, valid, z_sum, z_absolute, z_low, z_high)
            if A_IS != SAME:
                a_sum, a_absolute, a_low, a_high = extended(a, valid, a_sum, a_absolute, a_low, a_high)
            at = (e * positions + s) * groups + u // per_group
            if PEARSON:
                total = tl.load(lengths.total + at, mask=inside, other=0)
                length = tl.load(lengths.pearson + at, mask=inside, other=0)
                match, known = matched(y, valid, total, length, bias, mean_w, pearson_w, True)
                p_n0, p_n1, p_sum0, p_sum1 = summed(match, known, bits > 0, p_n0, p_n1, p_sum0, p_sum1)
            if COSINE:
                length = tl.load(lengths.cosine + at, mask=inside, other=0)
                match, known = matched(y, valid, length, length, bias, mean_w, cosine_w, False)
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
    tl.store(parts.top + run * units + unit_u, top, mask=of_unit)
    _store(parts.count + run * 4 * units + unit_u, units, of_unit, n, nonfinite, zeros, firing)
    _store(parts.z + run * 7 * units + unit_u, units, of_unit, z_low, z_high, z_absolute, z_mean)
    if A_IS != SAME:
        _store(parts.a + run * 7 * units + unit_u, units, of_unit, a_low, a_high, a_absolute, a_mean)
    own = parts.match + run * 12 * units + unit_u
    if PEARSON:
        _store_means(own, units, of_unit, p_n0, p_n1, p_mean0, p_mean1)
    if COSINE:
        _store_means(own + 6 * units, units, of_unit, c_n0, c_n1, c_mean0, c_mean1)
    return top, z_mean, a_mean, p_mean0, p_mean1, c_mean0, c_mean1


@triton.jit(do_not_specialize=["entries", "positions", "units", "per_group", "groups", "blocks"])
def observe(
    memory, by, lengths, patterns, parts, found, entries, positions, units, per_group, groups, blocks,
    A_IS: tl.constexpr, HAS_Y: tl.constexpr, HAS_MASK: tl.constexpr, HAS_NUMBER: tl.constexpr,
    BINS: tl.constexpr, PEARSON: tl.constexpr, COSINE: tl.constexpr, LEAST: tl.constexpr, BEST: tl.constexpr,
    OUTPUT: tl.constexpr, BL: tl.constexpr, BS: tl.constexpr, BU: tl.constexpr,
):  # fmt: skip
    """Everything of a run of `blocks` · BL entries and of BU units.

    Takes `Shown`, its strides, `Lengths`, `Patterns`, `Parts` whose bins are 0, and `Found`.
    """
    run = tl.program_id(0).to(tl.int64)
    unit_u = tl.program_id(1) * BU + tl.arange(0, BU)
    first, stop = run * blocks, tl.minimum(run * blocks + blocks, tl.cdiv(entries, BL))
    top, z_mean, a_mean, p_mean0, p_mean1, c_mean0, c_mean1 = _survey(
        memory, by, lengths, patterns, parts, run, first, stop, unit_u, entries, positions, units, per_group, groups,
        A_IS, HAS_Y, HAS_MASK, PEARSON, COSINE, BL, BS, BU,
    )  # fmt: skip
    nothing = tl.zeros([BL, BS, BU], tl.float64)
    z_m2, z_m3, z_m4, a_m2, a_m3, a_m4 = nothing, nothing, nothing, nothing, nothing, nothing
    p_m20, p_m21, c_m20, c_m21 = nothing, nothing, nothing, nothing
    of_unit = unit_u < units
    u = of_units(unit_u.to(tl.int64))
    bias = tl.load(patterns.bias + u, mask=of_units(of_unit), other=0)
    mean_w = tl.load(patterns.mean + u, mask=of_units(of_unit), other=0)
    pearson_w = tl.load(patterns.pearson + u, mask=of_units(of_unit), other=0)
    cosine_w = tl.load(patterns.cosine + u, mask=of_units(of_unit), other=0)
    match_bins = parts.match_bins + run * (2 * units * 2 * MATCH_BINS)
    for block in range(first, stop):
        entry_l = (block * BL + tl.arange(0, BL)).to(tl.int64)
        e = tl.expand_dims(tl.expand_dims(entry_l, 1), 1)
        lowest, no_place = tl.zeros([BL, BS, BU], tl.float32) - float("inf"), tl.zeros([BL, BS, BU], tl.int32)
        greatest, greatest_at, greatest_number = lowest, no_place, no_place.to(tl.int64) + LAST
        least, least_at, least_number = lowest, no_place, no_place.to(tl.int64) + LAST
        best, best_at, best_number = lowest.to(tl.float64), no_place, no_place.to(tl.int64) + LAST
        output = lowest
        for begin in range(0, positions, BS):
            index = tl.expand_dims(tl.expand_dims(begin + tl.arange(0, BS), 0), 2)
            s = index.to(tl.int64)
            inside = (e < entries) & (s < positions) & of_units(of_unit)
            z, a, y, _, valid = loaded(memory, by, e, s, u, inside, A_IS, HAS_Y, HAS_MASK)
            rest = tl.where(valid, z.to(tl.float64) - of_units(z_mean), 0)
            square = rest * rest
            z_m2 += square
            z_m3 += square * rest
            z_m4 += square * square
            if A_IS != SAME:
                rest = tl.where(valid, a.to(tl.float64) - of_units(a_mean), 0)
                square = rest * rest
                a_m2 += square
                a_m3 += square * rest
                a_m4 += square * square
            if BINS:
                at = parts.bins + (run * units + u) * BIN_ROOM + z_bin(z, of_units(top))
                tl.atomic_add(at, 1, mask=valid, sem="relaxed")
            number = s
            if HAS_NUMBER:
                known = (e < entries) & (s < positions)
                number = tl.load(memory.number + e * by.number[0] + s * by.number[1], mask=known, other=0)
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
            at = (e * positions + s) * groups + u // per_group
            if PEARSON or BEST:
                total = tl.load(lengths.total + at, mask=inside, other=0)
                length = tl.load(lengths.pearson + at, mask=inside, other=0)
                match, known = matched(y, valid, total, length, bias, mean_w, pearson_w, True)
                if PEARSON:
                    p_m20, p_m21 = binned(match, known, fired, p_mean0, p_mean1, p_m20, p_m21, match_bins, u)
                if BEST:
                    best, best_at, best_number = greater_of(
                        match, known, index, number, best, best_at, best_number, HAS_NUMBER
                    )
            if COSINE:
                length = tl.load(lengths.cosine + at, mask=inside, other=0)
                match, known = matched(y, valid, length, length, bias, mean_w, cosine_w, False)
                of_form = match_bins + units * (2 * MATCH_BINS)
                c_m20, c_m21 = binned(match, known, fired, c_mean0, c_mean1, c_m20, c_m21, of_form, u)
        at_lu = tl.expand_dims(entry_l, 1) * units + tl.expand_dims(unit_u, 0)
        inside_lu = (tl.expand_dims(entry_l, 1) < entries) & tl.expand_dims(of_unit, 0)
        of_row, place = greatest_of(greatest, greatest_at, greatest_number, HAS_NUMBER)
        tl.store(found.greatest + at_lu, of_row, mask=inside_lu)
        tl.store(found.greatest_at + at_lu, place, mask=inside_lu)
        if LEAST:
            of_row, place = greatest_of(least, least_at, least_number, HAS_NUMBER)
            tl.store(found.least + at_lu, of_row, mask=inside_lu)
            tl.store(found.least_at + at_lu, place, mask=inside_lu)
        if BEST:
            best_of_row, place = greatest_of(best, best_at, best_number, HAS_NUMBER)
            tl.store(found.best + at_lu, best_of_row, mask=inside_lu)
            tl.store(found.best_at + at_lu, place, mask=inside_lu)
        if OUTPUT:
            tl.store(found.output + at_lu, tl.max(output, axis=1), mask=inside_lu)
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
