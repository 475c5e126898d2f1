# mypy: ignore-errors
"""Offers the rows of a batch to those kept so far, in Triton: the work is in what is better, and that soon is rare.

Layer 1: Triton alone; only to be imported where that is installed. Of a unit (and octave) K places are held, in no
order; as long as a row has a smaller (key, uid) than the last of them, it takes that one's place.

Shapes: N rows, U units, K places of kept rows; tiles are (u, n) and (u, k).
"""

from __future__ import annotations

import triton
import triton.language as tl

from pipeline import hashing
from pipeline.kernels import ranked
from pipeline.kernels.triton_tile import GIVEN, LAST, RECTIFIED, matched

FIRST = tl.constexpr(-(1 << 63))
GAMMA, MIX_1, MIX_2 = (tl.constexpr(one - (1 << 64)) for one in (hashing.GAMMA, hashing.MIX_1, hashing.MIX_2))
LEAST_OCTAVE = tl.constexpr(ranked.LEAST_OCTAVE)
LAST_OCTAVE = tl.constexpr(ranked.LAST_OCTAVE)
FIRST_POSITIVE = tl.constexpr(ranked.STRATA // 2)


@triton.jit
def _column(value_u):
    return tl.expand_dims(value_u, 1)


@triton.jit
def _key_of(value):
    """An int64 in the order of the float64, the same for both zeros."""
    bits = (value + 0.0).to(tl.int64, bitcast=True)
    return bits ^ ((bits >> 63) & LAST)


@triton.jit
def _splitmix64(value):
    """`hashing.splitmix64` of int64s; a shift of them keeps the sign, which the masks take off."""
    z = value + GAMMA
    z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * MIX_1
    z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * MIX_2
    return (z ^ ((z >> 31) & ((1 << 33) - 1))) & LAST


@triton.jit
def _stratum_of(z):
    """The octave of z on its side of zero (`kernels.ranked`)."""
    octave = ((z.to(tl.int64, bitcast=True) & LAST) >> 52) - 1023
    octave = tl.minimum(tl.maximum(octave, LEAST_OCTAVE), LAST_OCTAVE)
    return tl.where(z < 0, LAST_OCTAVE - octave, FIRST_POSITIVE + octave - LEAST_OCTAVE)


@triton.jit
def _offer(key, uid, source, offered, offered_uid, candidate, row, slot, KP: tl.constexpr):
    """The best candidate of each unit in the place of its last row, where it is better; whether it was for any."""
    best = tl.min(tl.where(candidate, offered, LAST), axis=1)
    best_uid = tl.min(tl.where(candidate & (offered == _column(best)), offered_uid, LAST), axis=1)
    worst = tl.max(key, axis=1)
    worst_uid = tl.max(tl.where(key == _column(worst), uid, FIRST), axis=1)
    better = (best < worst) | ((best == worst) & (best_uid < worst_uid))
    chosen = candidate & (offered == _column(best)) & (offered_uid == _column(best_uid))
    best_row = tl.max(tl.where(chosen, row, -1), axis=1)
    is_worst = (key == _column(worst)) & (uid == _column(worst_uid))
    place = tl.min(tl.where(is_worst, slot, KP), axis=1)
    here = _column(better) & (slot == _column(place))
    key = tl.where(here, _column(best), key)
    uid = tl.where(here, _column(best_uid), uid)
    source = tl.where(here, _column(best_row), source)
    return key, uid, source, candidate & (chosen == 0), tl.max(better.to(tl.int32), axis=0)


@triton.jit
def _described(
    memory, by, lengths, patterns, e, s, u, new, positions, per_group, groups,
    A_IS: tl.constexpr, HAS_Y: tl.constexpr, HAS_NUMBER: tl.constexpr,
):  # fmt: skip
    """z, a, the position's number and the correlation of the rows that are new, at their places."""
    z = tl.load(memory.z + e * by.z[0] + s * by.z[1] + u * by.z[2], mask=new, other=0).to(tl.float32)
    a, y, number = z, z, s
    if A_IS == GIVEN:
        a = tl.load(memory.a + e * by.a[0] + s * by.a[1] + u * by.a[2], mask=new, other=0).to(tl.float32)
    if A_IS == RECTIFIED:
        a = tl.where(z > 0, z, 0)
    if HAS_Y:
        y = tl.load(memory.y + e * by.y[0] + s * by.y[1] + u * by.y[2], mask=new, other=0).to(tl.float32)
    if HAS_NUMBER:
        number = tl.load(memory.number + e * by.number[0] + s * by.number[1], mask=new, other=0)
    at_x = (e * positions + s) * groups + u // per_group
    total = tl.load(lengths.total + at_x, mask=new, other=0)
    length = tl.load(lengths.pearson + at_x, mask=new, other=0)
    own = u + 0 * e
    bias = tl.load(patterns.bias + own, mask=new, other=0)
    mean = tl.load(patterns.mean + own, mask=new, other=0)
    scale = tl.load(patterns.pearson + own, mask=new, other=0)
    match, known = matched(y, new, total, length, bias, mean, scale, True)
    return z, a, number, tl.where(known, match, float("nan"))


@triton.jit(do_not_specialize=["rows", "positions", "units", "per_group", "groups", "start"])
def keep(
    memory, by, lengths, patterns, value_NU, uid_N, entry_NU, index_NU,
    key_UK, uid_UK, position_UK, z_UK, a_UK, match_UK, rows, positions, units, per_group, groups, start,
    SPREAD: tl.constexpr, HASHED: tl.constexpr, FIRING: tl.constexpr, STRATA: tl.constexpr, K: tl.constexpr,
    A_IS: tl.constexpr, HAS_Y: tl.constexpr, HAS_NUMBER: tl.constexpr,
    KP: tl.constexpr, BN: tl.constexpr, BU: tl.constexpr, SP: tl.constexpr,
):  # fmt: skip
    """Offer all rows to SP strata of BU units.

    `value_NU` is −∞ where a row has no candidate, the rest is at its place; a row's entry is the row unless SPREAD.
    Hashes are of `start`, unit and uid.
    """
    unit_u = tl.program_id(0) * BU + tl.arange(0, BU)
    of_unit = _column(unit_u < units)
    unit = _column(unit_u.to(tl.int64))
    slot = tl.expand_dims(tl.arange(0, KP), 0)
    held = of_unit & (slot < K)
    for stratum in range(tl.program_id(1) * SP, tl.program_id(1) * SP + SP):
        at = unit * (STRATA * K) + stratum * K + slot
        # places that there are not are never the last
        key = tl.load(key_UK + at, mask=held, other=FIRST)
        uid = tl.load(uid_UK + at, mask=held, other=FIRST)
        source = tl.zeros([BU, KP], tl.int32) - 1
        for begin in range(0, rows, BN):
            row = tl.expand_dims(begin + tl.arange(0, BN), 0)
            there = of_unit & (row < rows)
            at_un = row.to(tl.int64) * units + unit
            value = tl.load(value_NU + at_un, mask=there, other=float("-inf")).to(tl.float64)
            candidate = there & (value > float("-inf"))
            # rows that are drawn are at their greatest z
            if FIRING:
                candidate = candidate & (value > 0)
            if STRATA > 1:
                candidate = candidate & (_stratum_of(value) == stratum)
            offered_uid = tl.load(uid_N + row + unit * 0, mask=there, other=0)
            offered = _key_of(-value)
            if HASHED:
                offered = _splitmix64(_splitmix64(unit + start) ^ offered_uid)
            # what is worse than the last place now will not come in later: soon that is every row
            candidate = candidate & (offered <= _column(tl.max(key, axis=1)))
            going = tl.max(tl.max(candidate.to(tl.int32), axis=1), axis=0)
            while going > 0:
                key, uid, source, candidate, going = _offer(
                    key, uid, source, offered, offered_uid, candidate, row, slot, KP
                )
        new = held & (source >= 0)
        if tl.max(tl.max(new.to(tl.int32), axis=1), axis=0) > 0:
            at_uk = tl.maximum(source, 0).to(tl.int64) * units + unit
            e = tl.maximum(source, 0).to(tl.int64)
            if SPREAD:
                e = tl.load(entry_NU + at_uk, mask=new, other=0).to(tl.int64)
            s = tl.load(index_NU + at_uk, mask=new, other=0).to(tl.int64)
            z, a, number, match = _described(
                memory, by, lengths, patterns, e, s, unit, new, positions, per_group, groups, A_IS, HAS_Y, HAS_NUMBER
            )
            tl.store(key_UK + at, key, mask=new)
            tl.store(uid_UK + at, uid, mask=new)
            tl.store(position_UK + at, number, mask=new)
            tl.store(z_UK + at, z.to(tl.float64), mask=new)
            tl.store(a_UK + at, a.to(tl.float64), mask=new)
            tl.store(match_UK + at, match, mask=new)
