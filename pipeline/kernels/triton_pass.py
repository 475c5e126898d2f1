# mypy: ignore-errors
"""The pass of the kernel for GPUs over one batch, in Triton: of units and of entries.

Layer 1: Triton alone; only to be imported where that is installed. Each program takes a run of entries and a few units,
and reads them twice while they are near: first for counts, extremes and means, then for everything around them. Sums of
a program are its own, so that nothing depends on the order in which programs run; `triton_fold` adds them up.

What z is, how it fires and which bin it falls in is read from its bits; a match is computed operation by operation as
`kernels.match` defines it, without contraction: the same numbers, the same bins.

Shapes: L entries, S positions, U units, G groups, R runs of entries; tiles are (l, s, u).
"""

from __future__ import annotations

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


@triton.jit
def _of_units(value_u):
    """(u) as (1, 1, u)."""
    return tl.expand_dims(tl.expand_dims(value_u, 0), 0)


@triton.jit
def _over_entries(value_lsu):
    return tl.sum(tl.sum(value_lsu, axis=1), axis=0)


@triton.jit
def _is_finite(value):
    return (value.to(tl.int32, bitcast=True) & EXPONENT) != EXPONENT


@triton.jit
def _shown(z, a, mask, z_by, a_by, mask_by, e, s, u, inside, A_IS: tl.constexpr, HAS_MASK: tl.constexpr):
    """z, a (both float32), which presentations there are, and which count."""
    shown = inside
    if HAS_MASK:
        in_entry = e * mask_by[0] + s * mask_by[1]
        shown = inside & (tl.load(mask + in_entry + u * 0, mask=inside, other=0) != 0)
    z_lsu = tl.load(z + e * z_by[0] + s * z_by[1] + u * z_by[2], mask=inside, other=0).to(tl.float32)
    valid = shown & _is_finite(z_lsu)
    if A_IS == GIVEN:
        a_lsu = tl.load(a + e * a_by[0] + s * a_by[1] + u * a_by[2], mask=inside, other=0).to(tl.float32)
        valid = valid & _is_finite(a_lsu)
    elif A_IS == RECTIFIED:
        a_lsu = tl.where(z_lsu > 0, z_lsu, 0)
    else:
        a_lsu = z_lsu
    return z_lsu, a_lsu, shown, valid


@triton.jit
def _match(y, total, length, bias, mean, scale, CENTRED: tl.constexpr):
    """The match in float64, NaN where undefined."""
    value = y + bias
    if CENTRED:
        value = value - total * mean
    value = value * scale * length
    value = tl.where(value < -1.0, -1.0, value)
    return tl.where(value > 1.0, 1.0, value)


@triton.jit
def _best(value, candidate, index, number, best, at, least, HAS_NUMBER: tl.constexpr):
    """The greatest value of each entry and unit so far: of equals the least number, or the first index."""
    value = tl.where(candidate, value, float("-inf"))
    of_tile = tl.max(value, axis=1)
    here = candidate & (value == tl.expand_dims(of_tile, 1))
    if HAS_NUMBER:
        of_number = tl.min(tl.where(here, number, LAST), axis=1)
        here = here & (number == tl.expand_dims(of_number, 1))
        better = (of_tile > best) | ((of_tile == best) & (of_number < least))
        least = tl.where(better, of_number, least)
    else:
        better = of_tile > best
    of_index = tl.min(tl.where(here, index, LAST_INDEX), axis=1)
    return tl.where(better, of_tile, best), tl.where(better, of_index, at), least


@triton.jit
def _lattice(z):
    """The lattice number of |z| (`kernels.bins.lattice`), int32."""
    return ((z.to(tl.int32, bitcast=True) & MAGNITUDE) >> BIN_SHIFT) - BIN_BIAS


@triton.jit
def _bin(z, top):
    """The place of z among the bins whose window ends at `top`."""
    bits = z.to(tl.int32, bitcast=True)
    place = tl.maximum(_lattice(z) - (top - KEPT - 1), 1)
    place = tl.where((bits & MAGNITUDE) == 0, 0, place)
    return ZERO + tl.where(bits < 0, -place, place)


@triton.jit
def _match_bin(match, fired):
    """The place of a match among the bins of the silent, then those of the firing."""
    bits = match.to(tl.int64, bitcast=True)
    place = ((bits & LAST) >> MATCH_SHIFT) - MATCH_BIAS
    place = tl.minimum(tl.maximum(place, 0), SIDE - 1)
    # the bits of −1 turn a place p on the negative side into −1 − p
    return (place ^ (bits >> 63)) + SIDE + tl.where(fired, MATCH_BINS, 0)


@triton.jit
def _add_matches(match, known, fired, mean_silent, mean_fired, m2_silent, m2_fired, bins, u):
    """Count the matches that are known in their bins, and sum their squares around the means."""
    tl.atomic_add(bins + u * (2 * MATCH_BINS) + _match_bin(match, fired), 1, mask=known, sem="relaxed")
    rest = tl.where(known, match - tl.where(fired, mean_fired, mean_silent), 0)
    square = rest * rest
    m2_silent += _over_entries(tl.where(fired, 0, square))
    m2_fired += _over_entries(tl.where(fired, square, 0))
    return m2_silent, m2_fired


@triton.jit
def _sum_matches(match, known, fired, n_silent, n_fired, sum_silent, sum_fired):
    n_silent += _over_entries((known & (fired == 0)).to(tl.int32))
    n_fired += _over_entries((known & fired).to(tl.int32))
    sum_silent += _over_entries(tl.where(known & (fired == 0), match, 0))
    sum_fired += _over_entries(tl.where(known & fired, match, 0))
    return n_silent, n_fired, sum_silent, sum_fired


@triton.jit
def _store_matches(moments, units, u, inside, n_silent, n_fired, mean_silent, mean_fired, m2_silent, m2_fired):
    tl.store(moments + 0 * units + u, n_silent.to(tl.float64), mask=inside)
    tl.store(moments + 1 * units + u, mean_silent, mask=inside)
    tl.store(moments + 2 * units + u, m2_silent, mask=inside)
    tl.store(moments + 3 * units + u, n_fired.to(tl.float64), mask=inside)
    tl.store(moments + 4 * units + u, mean_fired, mask=inside)
    tl.store(moments + 5 * units + u, m2_fired, mask=inside)


@triton.jit
def _mean(n, total, low, high):
    """The mean; of equal numbers it is that number, whatever the sum rounds to."""
    mean = total / tl.maximum(n, 1).to(tl.float64)
    mean = tl.minimum(tl.maximum(mean, low), high)
    return tl.where(n > 0, mean, 0)


@triton.jit(do_not_specialize=["entries", "positions", "units", "per_group", "groups", "blocks"])
def observe(
    z, a, y, mask, number, sum_LSG, pearson_LSG, cosine_LSG, bias_U, mean_U, pearson_U, cosine_U,
    z_by, a_by, y_by, mask_by, number_by,
    entries, positions, units, per_group, groups, blocks,
    count_R4U, z_R7U, a_R7U, top_RU, bin_RUB, match_bin_RFUB, match_RF6U,
    greatest_LU, greatest_at_LU, least_LU, least_at_LU, best_LU, best_at_LU, output_LU,
    A_IS: tl.constexpr, HAS_Y: tl.constexpr, HAS_MASK: tl.constexpr, HAS_NUMBER: tl.constexpr,
    BINS: tl.constexpr, PEARSON: tl.constexpr, COSINE: tl.constexpr, LEAST: tl.constexpr, BEST: tl.constexpr,
    OUTPUT: tl.constexpr, BL: tl.constexpr, BS: tl.constexpr, BU: tl.constexpr,
):  # fmt: skip
    """Everything of a run of `blocks` · BL entries and of BU units; see `triton_kernel` for what is passed."""
    run = tl.program_id(0).to(tl.int64)
    unit_u = tl.program_id(1) * BU + tl.arange(0, BU)
    of_unit = unit_u < units
    u = _of_units(unit_u.to(tl.int64))
    inside_u = _of_units(of_unit)
    group = u // per_group
    s_s = tl.arange(0, BS)
    l_l = tl.arange(0, BL)
    first = run * blocks
    stop = tl.minimum(first + blocks, tl.cdiv(entries, BL))
    bias = tl.load(bias_U + u, mask=inside_u, other=0)
    mean_w = tl.load(mean_U + u, mask=inside_u, other=0)
    pearson_w = tl.load(pearson_U + u, mask=inside_u, other=0)
    cosine_w = tl.load(cosine_U + u, mask=inside_u, other=0)

    n = tl.zeros([BU], tl.int32)
    nonfinite = tl.zeros([BU], tl.int32)
    zeros = tl.zeros([BU], tl.int32)
    firing = tl.zeros([BU], tl.int32)
    top = tl.zeros([BU], tl.int32) + EMPTY_TOP
    z_sum = tl.zeros([BU], tl.float64)
    z_low = tl.zeros([BU], tl.float64) + float("inf")
    z_high = tl.zeros([BU], tl.float64) - float("inf")
    z_absolute = tl.zeros([BU], tl.float64)
    a_sum = tl.zeros([BU], tl.float64)
    a_low = tl.zeros([BU], tl.float64) + float("inf")
    a_high = tl.zeros([BU], tl.float64) - float("inf")
    a_absolute = tl.zeros([BU], tl.float64)
    p_n0 = tl.zeros([BU], tl.int32)
    p_n1 = tl.zeros([BU], tl.int32)
    p_sum0 = tl.zeros([BU], tl.float64)
    p_sum1 = tl.zeros([BU], tl.float64)
    c_n0 = tl.zeros([BU], tl.int32)
    c_n1 = tl.zeros([BU], tl.int32)
    c_sum0 = tl.zeros([BU], tl.float64)
    c_sum1 = tl.zeros([BU], tl.float64)
    for block in range(first, stop):
        entry_l = block * BL + l_l
        e = tl.expand_dims(tl.expand_dims(entry_l.to(tl.int64), 1), 1)
        for begin in range(0, positions, BS):
            s = tl.expand_dims(tl.expand_dims((begin + s_s).to(tl.int64), 0), 2)
            inside = (e < entries) & (s < positions) & inside_u
            z_lsu, a_lsu, shown, valid = _shown(z, a, mask, z_by, a_by, mask_by, e, s, u, inside, A_IS, HAS_MASK)
            bits = z_lsu.to(tl.int32, bitcast=True)
            fired = bits > 0
            n += _over_entries(valid.to(tl.int32))
            nonfinite += _over_entries((shown & (valid == 0)).to(tl.int32))
            zeros += _over_entries((valid & ((bits & MAGNITUDE) == 0)).to(tl.int32))
            firing += _over_entries((valid & fired).to(tl.int32))
            top = tl.maximum(top, tl.max(tl.max(tl.where(valid, _lattice(z_lsu), EMPTY_TOP), axis=1), axis=0))
            z64 = z_lsu.to(tl.float64)
            z_sum += _over_entries(tl.where(valid, z64, 0))
            z_absolute += _over_entries(tl.where(valid, tl.abs(z64), 0))
            z_low = tl.minimum(z_low, tl.min(tl.min(tl.where(valid, z64, float("inf")), axis=1), axis=0))
            z_high = tl.maximum(z_high, tl.max(tl.max(tl.where(valid, z64, float("-inf")), axis=1), axis=0))
            if A_IS != SAME:
                a64 = a_lsu.to(tl.float64)
                a_sum += _over_entries(tl.where(valid, a64, 0))
                a_absolute += _over_entries(tl.where(valid, tl.abs(a64), 0))
                a_low = tl.minimum(a_low, tl.min(tl.min(tl.where(valid, a64, float("inf")), axis=1), axis=0))
                a_high = tl.maximum(a_high, tl.max(tl.max(tl.where(valid, a64, float("-inf")), axis=1), axis=0))
            if PEARSON or COSINE:
                y_lsu = z_lsu
                if HAS_Y:
                    y_lsu = tl.load(y + e * y_by[0] + s * y_by[1] + u * y_by[2], mask=inside, other=0).to(tl.float32)
                at = (e * positions + s) * groups + group
                meant = valid & _is_finite(y_lsu)
                total = tl.load(sum_LSG + at, mask=inside, other=0)
                if PEARSON:
                    length = tl.load(pearson_LSG + at, mask=inside, other=0)
                    match = _match(y_lsu.to(tl.float64), total, length, bias, mean_w, pearson_w, True)
                    known = meant & (match == match)
                    p_n0, p_n1, p_sum0, p_sum1 = _sum_matches(match, known, fired, p_n0, p_n1, p_sum0, p_sum1)
                if COSINE:
                    length = tl.load(cosine_LSG + at, mask=inside, other=0)
                    match = _match(y_lsu.to(tl.float64), total, length, bias, mean_w, cosine_w, False)
                    known = meant & (match == match)
                    c_n0, c_n1, c_sum0, c_sum1 = _sum_matches(match, known, fired, c_n0, c_n1, c_sum0, c_sum1)

    z_mean = _mean(n, z_sum, z_low, z_high)
    a_mean = _mean(n, a_sum, a_low, a_high)
    p_mean0 = p_sum0 / tl.maximum(p_n0, 1).to(tl.float64)
    p_mean1 = p_sum1 / tl.maximum(p_n1, 1).to(tl.float64)
    c_mean0 = c_sum0 / tl.maximum(c_n0, 1).to(tl.float64)
    c_mean1 = c_sum1 / tl.maximum(c_n1, 1).to(tl.float64)
    z_m2 = tl.zeros([BU], tl.float64)
    z_m3 = tl.zeros([BU], tl.float64)
    z_m4 = tl.zeros([BU], tl.float64)
    a_m2 = tl.zeros([BU], tl.float64)
    p_m20 = tl.zeros([BU], tl.float64)
    p_m21 = tl.zeros([BU], tl.float64)
    c_m20 = tl.zeros([BU], tl.float64)
    c_m21 = tl.zeros([BU], tl.float64)
    top_u = _of_units(top)
    z_mean_u = _of_units(z_mean)
    a_mean_u = _of_units(a_mean)
    p_mean0_u = _of_units(p_mean0)
    p_mean1_u = _of_units(p_mean1)
    c_mean0_u = _of_units(c_mean0)
    c_mean1_u = _of_units(c_mean1)
    own_bins = bin_RUB + run * units * BIN_ROOM
    pearson_bins = match_bin_RFUB + run * (2 * units * 2 * MATCH_BINS)
    cosine_bins = pearson_bins + units * (2 * MATCH_BINS)
    for block in range(first, stop):
        entry_l = block * BL + l_l
        e = tl.expand_dims(tl.expand_dims(entry_l.to(tl.int64), 1), 1)
        greatest = tl.zeros([BL, BU], tl.float32) - float("inf")
        greatest_at = tl.zeros([BL, BU], tl.int32)
        greatest_number = tl.zeros([BL, BU], tl.int64) + LAST
        least = tl.zeros([BL, BU], tl.float32) - float("inf")
        least_at = tl.zeros([BL, BU], tl.int32)
        least_number = tl.zeros([BL, BU], tl.int64) + LAST
        best = tl.zeros([BL, BU], tl.float64) - float("inf")
        best_at = tl.zeros([BL, BU], tl.int32)
        best_number = tl.zeros([BL, BU], tl.int64) + LAST
        output = tl.zeros([BL, BU], tl.float32) - float("inf")
        for begin in range(0, positions, BS):
            index = tl.expand_dims(tl.expand_dims(begin + s_s, 0), 2)
            s = index.to(tl.int64)
            inside = (e < entries) & (s < positions) & inside_u
            z_lsu, a_lsu, shown, valid = _shown(z, a, mask, z_by, a_by, mask_by, e, s, u, inside, A_IS, HAS_MASK)
            fired = z_lsu.to(tl.int32, bitcast=True) > 0
            rest = tl.where(valid, z_lsu.to(tl.float64) - z_mean_u, 0)
            square = rest * rest
            z_m2 += _over_entries(square)
            z_m3 += _over_entries(square * rest)
            z_m4 += _over_entries(square * square)
            if A_IS != SAME:
                rest = tl.where(valid, a_lsu.to(tl.float64) - a_mean_u, 0)
                a_m2 += _over_entries(rest * rest)
            if BINS:
                tl.atomic_add(own_bins + u * BIN_ROOM + _bin(z_lsu, top_u), 1, mask=valid, sem="relaxed")
            place = s * 0
            if HAS_NUMBER:
                known_s = (e < entries) & (s < positions)
                place = tl.load(number + e * number_by[0] + s * number_by[1], mask=known_s, other=0)
            greatest, greatest_at, greatest_number = _best(
                z_lsu, valid, index, place, greatest, greatest_at, greatest_number, HAS_NUMBER
            )
            if LEAST:
                least, least_at, least_number = _best(
                    -z_lsu, valid, index, place, least, least_at, least_number, HAS_NUMBER
                )
            if OUTPUT:
                output = tl.maximum(output, tl.max(tl.where(valid, a_lsu, float("-inf")), axis=1))
            if PEARSON or COSINE or BEST:
                y_lsu = z_lsu
                if HAS_Y:
                    y_lsu = tl.load(y + e * y_by[0] + s * y_by[1] + u * y_by[2], mask=inside, other=0).to(tl.float32)
                at = (e * positions + s) * groups + group
                meant = valid & _is_finite(y_lsu)
                total = tl.load(sum_LSG + at, mask=inside, other=0)
                if PEARSON or BEST:
                    length = tl.load(pearson_LSG + at, mask=inside, other=0)
                    match = _match(y_lsu.to(tl.float64), total, length, bias, mean_w, pearson_w, True)
                    known = meant & (match == match)
                    if PEARSON:
                        p_m20, p_m21 = _add_matches(
                            match, known, fired, p_mean0_u, p_mean1_u, p_m20, p_m21, pearson_bins, u
                        )
                    if BEST:
                        best, best_at, best_number = _best(
                            match, known, index, place, best, best_at, best_number, HAS_NUMBER
                        )
                if COSINE:
                    length = tl.load(cosine_LSG + at, mask=inside, other=0)
                    match = _match(y_lsu.to(tl.float64), total, length, bias, mean_w, cosine_w, False)
                    known = meant & (match == match)
                    c_m20, c_m21 = _add_matches(match, known, fired, c_mean0_u, c_mean1_u, c_m20, c_m21, cosine_bins, u)
        at_lu = tl.expand_dims(entry_l.to(tl.int64), 1) * units + tl.expand_dims(unit_u, 0)
        inside_lu = (tl.expand_dims(entry_l, 1) < entries) & tl.expand_dims(of_unit, 0)
        tl.store(greatest_LU + at_lu, greatest, mask=inside_lu)
        tl.store(greatest_at_LU + at_lu, greatest_at, mask=inside_lu)
        if LEAST:
            tl.store(least_LU + at_lu, least, mask=inside_lu)
            tl.store(least_at_LU + at_lu, least_at, mask=inside_lu)
        if BEST:
            tl.store(best_LU + at_lu, best, mask=inside_lu)
            tl.store(best_at_LU + at_lu, best_at, mask=inside_lu)
        if OUTPUT:
            tl.store(output_LU + at_lu, output, mask=inside_lu)

    counted = count_R4U + run * 4 * units + unit_u
    tl.store(counted, n, mask=of_unit)
    tl.store(counted + units, nonfinite, mask=of_unit)
    tl.store(counted + 2 * units, zeros, mask=of_unit)
    tl.store(counted + 3 * units, firing, mask=of_unit)
    tl.store(top_RU + run * units + unit_u, top, mask=of_unit)
    _store_moments(
        z_R7U + run * 7 * units + unit_u, units, of_unit, z_low, z_high, z_absolute, z_mean, z_m2, z_m3, z_m4
    )
    if A_IS != SAME:
        _store_moments(
            a_R7U + run * 7 * units + unit_u, units, of_unit, a_low, a_high, a_absolute, a_mean, a_m2, a_m2, a_m2
        )
    own_match = match_RF6U + run * 12 * units
    if PEARSON:
        _store_matches(own_match, units, unit_u, of_unit, p_n0, p_n1, p_mean0, p_mean1, p_m20, p_m21)
    if COSINE:
        _store_matches(own_match + 6 * units, units, unit_u, of_unit, c_n0, c_n1, c_mean0, c_mean1, c_m20, c_m21)


@triton.jit
def _store_moments(at, units, inside, low, high, absolute, mean, m2, m3, m4):
    tl.store(at, low, mask=inside)
    tl.store(at + units, high, mask=inside)
    tl.store(at + 2 * units, absolute, mask=inside)
    tl.store(at + 3 * units, mean, mask=inside)
    tl.store(at + 4 * units, m2, mask=inside)
    tl.store(at + 5 * units, m3, mask=inside)
    tl.store(at + 6 * units, m4, mask=inside)
