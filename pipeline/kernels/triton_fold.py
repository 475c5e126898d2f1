# mypy: ignore-errors
"""Adds what the runs of a batch came to, to what is known of the units, in Triton.

Layer 1: Triton alone; only to be imported where that is installed. All parts of a unit are moved to their common mean
and summed there, as Chan, Golub & LeVeque (1979) and Pébay (2008) do with two: the same bits whatever the order
in which programs ran.

Shapes: U units, R runs of a batch; tiles are (r, u).
"""

from __future__ import annotations

import triton
import triton.language as tl

from pipeline.kernels import bins
from pipeline.kernels.triton_tile import BIN_ROOM, ZERO

BIN_COUNT = tl.constexpr(bins.BINS)


@triton.jit
def _common_mean(n0, mean0, n_ru, mean_ru):
    """How many values there are, and their mean; 0 of none."""
    n = n0 + tl.sum(n_ru, axis=0)
    total = n0 * mean0 + tl.sum(n_ru * mean_ru, axis=0)
    return n, tl.where(n > 0, total / tl.maximum(n, 1), 0)


@triton.jit
def _fold_moments(state, parts, n0, n_ru, units, r, u, inside_u, inside):
    """Fold the parts (R, 7, U) of min, max, Σ|v|, mean, m2, m3, m4 into the state (7, U)."""
    at = parts + r * 7 * units + u
    low = tl.load(state + u, mask=inside_u, other=0)
    low = tl.minimum(low, tl.min(tl.load(at, mask=inside, other=float("inf")), axis=0))
    high = tl.load(state + units + u, mask=inside_u, other=0)
    high = tl.maximum(high, tl.max(tl.load(at + units, mask=inside, other=float("-inf")), axis=0))
    absolute = tl.load(state + 2 * units + u, mask=inside_u, other=0)
    absolute += tl.sum(tl.load(at + 2 * units, mask=inside, other=0), axis=0)
    mean0 = tl.load(state + 3 * units + u, mask=inside_u, other=0)
    mean_ru = tl.load(at + 3 * units, mask=inside, other=0)
    n, mean = _common_mean(n0, mean0, n_ru, mean_ru)
    # of equal numbers it is that number, whatever the sum rounds to
    mean = tl.where(n > 0, tl.minimum(tl.maximum(mean, low), high), 0)
    d0 = mean0 - mean
    d = mean_ru - tl.expand_dims(mean, 0)
    m20 = tl.load(state + 4 * units + u, mask=inside_u, other=0)
    m2_ru = tl.load(at + 4 * units, mask=inside, other=0)
    m2 = m20 + n0 * d0 * d0 + tl.sum(m2_ru + n_ru * d * d, axis=0)
    tl.store(state + u, low, mask=inside_u)
    tl.store(state + units + u, high, mask=inside_u)
    tl.store(state + 2 * units + u, absolute, mask=inside_u)
    tl.store(state + 3 * units + u, mean, mask=inside_u)
    tl.store(state + 4 * units + u, m2, mask=inside_u)
    m30 = tl.load(state + 5 * units + u, mask=inside_u, other=0)
    m3_ru = tl.load(at + 5 * units, mask=inside, other=0)
    m40 = tl.load(state + 6 * units + u, mask=inside_u, other=0)
    m4_ru = tl.load(at + 6 * units, mask=inside, other=0)
    m3 = m30 + 3 * d0 * m20 + n0 * d0 * d0 * d0
    m3 += tl.sum(m3_ru + 3 * d * m2_ru + n_ru * d * d * d, axis=0)
    m4 = m40 + 4 * d0 * m30 + 6 * d0 * d0 * m20 + n0 * d0 * d0 * d0 * d0
    m4 += tl.sum(m4_ru + 4 * d * m3_ru + 6 * d * d * m2_ru + n_ru * d * d * d * d, axis=0)
    tl.store(state + 5 * units + u, m3, mask=inside_u)
    tl.store(state + 6 * units + u, m4, mask=inside_u)


@triton.jit
def _fold_matches(state, parts, units, r, u, inside_u, inside):
    """Fold the parts (R, 12, U) of n, mean, m2 into the state, which begins at `state`."""
    at = parts + r * 12 * units + u
    n0 = tl.load(state + u, mask=inside_u, other=0)
    mean0 = tl.load(state + units + u, mask=inside_u, other=0)
    n_ru = tl.load(at, mask=inside, other=0)
    mean_ru = tl.load(at + units, mask=inside, other=0)
    n, mean = _common_mean(n0, mean0, n_ru, mean_ru)
    d0 = mean0 - mean
    d = mean_ru - tl.expand_dims(mean, 0)
    m2 = tl.load(state + 2 * units + u, mask=inside_u, other=0) + n0 * d0 * d0
    m2 += tl.sum(tl.load(at + 2 * units, mask=inside, other=0) + n_ru * d * d, axis=0)
    tl.store(state + u, n, mask=inside_u)
    tl.store(state + units + u, mean, mask=inside_u)
    tl.store(state + 2 * units + u, m2, mask=inside_u)


@triton.jit(do_not_specialize=["units", "runs"])
def fold(
    count_4U, z_7U, a_7U, match_F6U, count_R4U, z_R7U, a_R7U, match_RF6U, units, runs,
    PEARSON: tl.constexpr, COSINE: tl.constexpr, BR: tl.constexpr, BU: tl.constexpr,
):  # fmt: skip
    """Fold the parts of all runs into the state of BU units."""
    u_u = tl.program_id(0) * BU + tl.arange(0, BU)
    inside_u = u_u < units
    u = tl.expand_dims(u_u, 0)
    r = tl.expand_dims(tl.arange(0, BR), 1)
    inside = (r < runs) & tl.expand_dims(inside_u, 0)
    n0 = tl.load(count_4U + u_u, mask=inside_u, other=0).to(tl.float64)
    n_ru = tl.load(count_R4U + r * 4 * units + u, mask=inside, other=0).to(tl.float64)
    _fold_moments(z_7U, z_R7U, n0, n_ru, units, r, u_u, inside_u, inside)
    _fold_moments(a_7U, a_R7U, n0, n_ru, units, r, u_u, inside_u, inside)
    for which in tl.static_range(4):
        of_runs = tl.load(count_R4U + (r * 4 + which) * units + u, mask=inside, other=0)
        at = count_4U + which * units + u_u
        before = tl.load(at, mask=inside_u, other=0)
        tl.store(at, before + tl.sum(of_runs.to(tl.int64), axis=0), mask=inside_u)
    for form in tl.static_range(2):
        if PEARSON if form == 0 else COSINE:
            for fired in tl.static_range(2):
                first = (form * 6 + fired * 3) * units
                _fold_matches(match_F6U + first, match_RF6U + first, units, r, u_u, inside_u, inside)


@triton.jit
def _raised(count_RB, rise, place, inside):
    """Counts (r, b) in windows that end `rise` higher, and how many become the small ones of either side."""
    far = tl.abs(place - ZERO)
    moved = far + tl.where(far == 0, 0, rise)
    kept = inside & (far != 1) & (moved <= ZERO)
    count = tl.load(count_RB + ZERO + tl.where(place < ZERO, -moved, moved), mask=kept, other=0).to(tl.int64)
    # what falls out below joins the small ones
    fallen = inside & (far > 0) & (far <= rise + 1)
    small = tl.load(count_RB + place, mask=fallen, other=0).to(tl.int64)
    below = tl.sum(tl.where(place < ZERO, small, 0), axis=1)
    above = tl.sum(tl.where(place > ZERO, small, 0), axis=1)
    return tl.sum(count, axis=0), tl.sum(below, axis=0), tl.sum(above, axis=0)


@triton.jit(do_not_specialize=["units", "runs"])
def fold_bins(top_U, count_UB, top_RU, count_RUB, units, runs, BR: tl.constexpr, BN: tl.constexpr):
    """Count the state and all runs of one unit, in place, in the highest of their windows, BN runs at once."""
    u = tl.program_id(0).to(tl.int64)
    r = tl.arange(0, BR)
    before = tl.load(top_U + u)
    top = tl.maximum(before, tl.max(tl.load(top_RU + r * units + u, mask=r < runs, other=-(1 << 30)), axis=0))
    place_b = tl.arange(0, BIN_ROOM)
    place = tl.expand_dims(place_b, 0)
    known = place < BIN_COUNT
    own = count_UB + u * BIN_COUNT
    count, below, above = _raised(own, top - before, place, known)
    for first in range(0, runs, BN):
        run = tl.expand_dims(first + tl.arange(0, BN), 1)
        inside = known & (run < runs)
        rise = top - tl.load(top_RU + run * units + u, mask=run < runs, other=0)
        more, more_below, more_above = _raised(count_RUB + (run * units + u) * BIN_ROOM, rise, place, inside)
        count, below, above = count + more, below + more_below, above + more_above
    count += tl.where(place_b == ZERO - 1, below, 0) + tl.where(place_b == ZERO + 1, above, 0)
    # others read what was there
    tl.debug_barrier()
    tl.store(top_U + u, top)
    tl.store(own + place_b, count, mask=place_b < BIN_COUNT)
