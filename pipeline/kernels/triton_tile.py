# mypy: ignore-errors
# ruff: noqa: E741 -- l as in the shapes
"""What the kernel for GPUs does with a tile of presentations in hand, in Triton.

Layer 1: Triton alone; only to be imported where that is installed. What z is, how it fires and which bin it falls in is
read from its bits; a match is computed operation by operation as `kernels.match` defines it: the same numbers, the same
bins, as long as no product is contracted with a sum.

Shapes: tiles are (l, s, u): entries, positions, units.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from pipeline.kernels import bins, matchbins

# what A_IS says of a: it is z, max(z, 0), or given
SAME, RECTIFIED, GIVEN = (tl.constexpr(number) for number in range(3))
MAGNITUDE = tl.constexpr((1 << 31) - 1)
EXPONENT = tl.constexpr(0x7F800000)
LAST = tl.constexpr((1 << 63) - 1)
LAST_INDEX = tl.constexpr((1 << 31) - 1)
BIN_SHIFT = tl.constexpr(23 - bins.MANTISSA_BITS)
BIN_BIAS = tl.constexpr(127 << bins.MANTISSA_BITS)
KEPT = tl.constexpr(bins.KEPT)
ZERO = tl.constexpr(bins.ZERO)
EMPTY_TOP = tl.constexpr(bins.EMPTY_TOP)
# room for a unit's bins, a power of two
BIN_ROOM = tl.constexpr(128)
MATCH_SHIFT = tl.constexpr(52 - matchbins.MANTISSA_BITS)
MATCH_BIAS = tl.constexpr((1023 << matchbins.MANTISSA_BITS) + matchbins.BELOW)
SIDE = tl.constexpr(matchbins.SIDE)
MATCH_BINS = tl.constexpr(matchbins.BINS)


class Shown(NamedTuple):
    """z, a and w·x + b (L, S, U), mask and numbers of positions (L, S): where they are in memory, or their strides."""

    z: Any
    a: Any
    y: Any
    mask: Any
    number: Any


class Lengths(NamedTuple):
    """Of x at every presentation and group (L, S, G), float64: Σx, 1/‖x − x̄‖ and 1/‖x‖; NaN where undefined."""

    total: Any
    pearson: Any
    cosine: Any


class Patterns(NamedTuple):
    """Of w of every unit, float64: −b, w̄, 1/‖w − w̄‖ and 1/‖w‖; NaN where undefined."""

    bias: Any
    mean: Any
    pearson: Any
    cosine: Any


@triton.jit
def of_units(value_u):
    """(u) as (1, 1, u)."""
    return tl.expand_dims(tl.expand_dims(value_u, 0), 0)


@triton.jit
def over_entries(value_lsu):
    """The sums of the units."""
    return tl.sum(tl.sum(value_lsu, axis=1), axis=0)


@triton.jit
def is_finite(value):
    """Whether a float32 is neither NaN nor infinite."""
    return (value.to(tl.int32, bitcast=True) & EXPONENT) != EXPONENT


@triton.jit
def loaded(memory, by, e0, s0, l, s, u, inside, A_IS: tl.constexpr, HAS_Y: tl.constexpr, HAS_MASK: tl.constexpr):
    """z, a and y as float32, which presentations there are, and which count; e0 and s0 are the tile's first."""
    l, s, u = l.to(tl.int64), s.to(tl.int64), u.to(tl.int64)
    shown = inside
    if HAS_MASK:
        near = l * by.mask[0] + s * by.mask[1] + u * 0
        at = memory.mask + (e0 * by.mask[0] + s0 * by.mask[1])
        shown = inside & (tl.load(at + near, mask=inside, other=0) != 0)
    # what does not change from tile to tile comes last
    at = memory.z + (e0 * by.z[0] + s0 * by.z[1])
    z = tl.load(at + (l * by.z[0] + s * by.z[1] + u * by.z[2]), mask=inside, other=0).to(tl.float32)
    valid = shown & is_finite(z)
    a = z
    if A_IS == GIVEN:
        at = memory.a + (e0 * by.a[0] + s0 * by.a[1])
        a = tl.load(at + (l * by.a[0] + s * by.a[1] + u * by.a[2]), mask=inside, other=0).to(tl.float32)
        valid = valid & is_finite(a)
    if A_IS == RECTIFIED:
        a = tl.where(z > 0, z, 0)
    y = z
    if HAS_Y:
        at = memory.y + (e0 * by.y[0] + s0 * by.y[1])
        y = tl.load(at + (l * by.y[0] + s * by.y[1] + u * by.y[2]), mask=inside, other=0).to(tl.float32)
    return z, a, y, shown, valid


@triton.jit
def matched(y, valid, total, length, bias, mean, scale, CENTRED: tl.constexpr):
    """The match in float64, and where it is defined."""
    value = y.to(tl.float64) + bias
    if CENTRED:
        value = value - total * mean
    value = value * scale * length
    value = tl.where(value < -1.0, -1.0, value)
    value = tl.where(value > 1.0, 1.0, value)
    return value, valid & is_finite(y) & (value == value)


@triton.jit
def extended(value, wide, valid, total, absolute, low, high):
    """Σv, Σ|v| and the extremes with a tile more, at each place of the tile: they are put together at the end.

    `wide` is the value in float64, 0 where it does not count.
    """
    low = tl.minimum(low, tl.where(valid, value, float("inf")))
    high = tl.maximum(high, tl.where(valid, value, float("-inf")))
    return total + wide, absolute + tl.abs(wide), low, high


@triton.jit
def extremes(low, high):
    """The extremes of the units, float64."""
    low = tl.min(tl.min(low, axis=1), axis=0)
    return low.to(tl.float64), tl.max(tl.max(high, axis=1), axis=0).to(tl.float64)


@triton.jit
def summed(match, known, fired, n_silent, n_fired, sum_silent, sum_fired):
    """Numbers and sums of the matches of the silent and of the firing with a tile more, at each place of the tile."""
    silent = known & (fired == 0)
    fired = known & fired
    n_silent += silent.to(tl.int32)
    n_fired += fired.to(tl.int32)
    sum_silent += tl.where(silent, match, 0)
    sum_fired += tl.where(fired, match, 0)
    return n_silent, n_fired, sum_silent, sum_fired


@triton.jit
def binned(match, known, fired, mean_silent, mean_fired, m2_silent, m2_fired, bins):
    """Count the matches in their bins; Σ(m − m̄)² of the silent and of the firing with a tile more, at each place."""
    tl.atomic_add(bins + match_bin(match, fired), 1, mask=known, sem="relaxed")
    rest = tl.where(known, match - tl.where(fired, of_units(mean_fired), of_units(mean_silent)), 0)
    square = rest * rest
    m2_silent += tl.where(fired, 0, square)
    m2_fired += tl.where(fired, square, 0)
    return m2_silent, m2_fired


@triton.jit
def greater_of(value, candidate, index, number, best, at, least, HAS_NUMBER: tl.constexpr):
    """The greatest value so far at each place of the tile, its index and number: of equals the least number, or first.

    Indices rise from tile to tile.
    """
    value = tl.where(candidate, value, float("-inf"))
    better = value > best
    if HAS_NUMBER:
        better = better | ((value == best) & candidate & (number < least))
        least = tl.where(better, number, least)
    return tl.where(better, value, best), tl.where(better, index, at), least


@triton.jit
def greatest_of(best, at, least, HAS_NUMBER: tl.constexpr):
    """The greatest value of each entry and unit, and its index: of equals the least number, or the first; else 0."""
    greatest = tl.max(best, axis=1)
    here = best == tl.expand_dims(greatest, 1)
    if HAS_NUMBER:
        here = here & (least == tl.expand_dims(tl.min(tl.where(here, least, LAST), axis=1), 1))
    index = tl.min(tl.where(here, at, LAST_INDEX), axis=1)
    return greatest, tl.where(greatest > float("-inf"), index, 0)


@triton.jit
def lattice(z):
    """The lattice number of |z| (`kernels.bins.lattice`), int32."""
    return ((z.to(tl.int32, bitcast=True) & MAGNITUDE) >> BIN_SHIFT) - BIN_BIAS


@triton.jit
def z_bin(z, top):
    """The place of z among the bins whose window ends at `top`."""
    bits = z.to(tl.int32, bitcast=True)
    place = tl.maximum(lattice(z) - (top - KEPT - 1), 1)
    place = tl.where((bits & MAGNITUDE) == 0, 0, place)
    return ZERO + tl.where(bits < 0, -place, place)


@triton.jit
def match_bin(match, fired):
    """The place of a match among the bins of the silent, then those of the firing."""
    bits = match.to(tl.int64, bitcast=True)
    place = ((bits & LAST) >> MATCH_SHIFT) - MATCH_BIAS
    place = tl.minimum(tl.maximum(place, 0), SIDE - 1)
    # the bits of −1 turn a place p on the negative side into −1 − p
    return (place ^ (bits >> 63)) + SIDE + tl.where(fired, MATCH_BINS, 0)
