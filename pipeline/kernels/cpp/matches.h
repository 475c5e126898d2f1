// How well inputs match a pattern, as kernels/match.py and kernels/matchbins.py define it, operation by operation.

#pragma once

#include "moments.h"

// MATCH_SIDE, MATCH_BITS and MATCH_BELOW are kernels/matchbins.py's SIDE, MANTISSA_BITS and BELOW
static const int MATCH_BINS = 2 * MATCH_SIDE;
static const int MATCH_SHIFT = 20 - MATCH_BITS, MATCH_LEAST = (1023 << MATCH_BITS) + MATCH_BELOW;

// A unit's −b and w̄, and 1/‖w − w̄‖ or 1/‖w‖; NaN where undefined.
struct Pattern {
    double bias, mean, scale;
};

// Moments of the matches of the silent, or of the firing.
struct MatchMoments {
    double n, mean, m2;
};

// CENTRED: the correlation, else the cosine. `length` is 1/‖x − x̄‖ or 1/‖x‖, NaN where undefined; so is the match.
template <bool CENTRED, class Double>
static inline Double match_of(Double y, Double sum, Double length, const Pattern &pattern) {
    Double value = y + pattern.bias;
    if (CENTRED) value = value - sum * pattern.mean;
    value = value * pattern.scale * length;
    const Double one = Double{} + 1;
    value = value < -one ? -one : value;
    return value > one ? one : value;
}

template <bool CENTRED>
static void matches(const float *y, const double *sum, const double *length, int64_t n, const Pattern &pattern,
                    double *match) {
    int64_t p = 0;
    for (; p + 4 <= n; p += 4)
        store(match + p,
              match_of<CENTRED>(widened(y + p), load<d4>(sum + p), load<d4>(length + p), pattern));
    for (; p < n; p++) match[p] = match_of<CENTRED>((double)y[p], sum[p], length[p], pattern);
}

// Of the silent and of the firing, where m is defined: how many, Σ(m − centre) and Σ(m − centre)².
struct MatchSums {
    int64_t n[2];
    double s1[2], s2[2];
};

static MatchSums match_sums(const double *match, const float *z, int64_t n, double silent, double firing) {
    const d4 zero = {}, of_silent = zero + silent, of_firing = zero + firing;
    d4 s1[2] = {}, s2[2] = {};
    l4 count[2] = {};
    int64_t p = 0;
    for (; p + 4 <= n; p += 4) {
        d4 value = load<d4>(match + p);
        l4 fired = widened(z + p) > zero, known = value == value;
        d4 rest = value - (fired ? of_firing : of_silent);
        l4 which[2] = {known & ~fired, known & fired};
        for (int i = 0; i < 2; i++) {
            d4 counted = (d4)((l4)rest & which[i]);
            count[i] -= which[i];
            s1[i] += counted, s2[i] += counted * counted;
        }
    }
    MatchSums sums;
    for (int i = 0; i < 2; i++)
        sums.n[i] = count[i][0] + count[i][1] + count[i][2] + count[i][3], sums.s1[i] = sum(s1[i]), sums.s2[i] = sum(s2[i]);
    for (; p < n; p++) {
        if (match[p] != match[p]) continue;
        bool fired = z[p] > 0;
        double rest = match[p] - (fired ? firing : silent);
        sums.n[fired]++, sums.s1[fired] += rest, sums.s2[fired] += rest * rest;
    }
    return sums;
}

// The bins of the silent first, then those of the firing, then one for what is undefined.
static inline int32_t match_bin(double match, bool fired) {
    if (match != match) return 2 * MATCH_BINS;
    int32_t high = (int32_t)(bits_of(match) >> 32), place = ((high & INT32_MAX) >> MATCH_SHIFT) - MATCH_LEAST;
    place = place < 0 ? 0 : place > MATCH_SIDE - 1 ? MATCH_SIDE - 1 : place;
    // the bits of −1 turn a place p on the negative side into −1 − p
    return (place ^ (high >> 31)) + MATCH_SIDE + (fired ? MATCH_BINS : 0);
}

static void count_matches(const double *match, const float *z, int64_t n, uint32_t *count) {
    const w8 none = {};
    int64_t p = 0;
    for (; p + 8 <= n; p += 8) {
        d4 left = load<d4>(match + p), right = load<d4>(match + p + 4);
        w8 high = SHUFFLE((w8)left, (w8)right, 1, 3, 5, 7, 9, 11, 13, 15);
        w8 known = SHUFFLE((w8)(left == left), (w8)(right == right), 1, 3, 5, 7, 9, 11, 13, 15);
        w8 place = ((high & INT32_MAX) >> MATCH_SHIFT) - MATCH_LEAST;
        place = smaller(larger(place, none), none + (MATCH_SIDE - 1));
        place = (place ^ (high >> 31)) + MATCH_SIDE + ((w8)(load<f8>(z + p) > (f8)none) & MATCH_BINS);
        place = (place & known) | (2 * MATCH_BINS & ~known);
        for (int lane = 0; lane < 8; lane++) count[place[lane]]++;
    }
    for (; p < n; p++) count[match_bin(match[p], z[p] > 0)]++;
}

static void merge_matches(MatchMoments *state, int64_t n_run, double centre, double s1, double s2) {
    if (n_run == 0) return;
    double n = (double)n_run, d = s1 / n, m2 = s2 - s1 * d, mean = centre + d;
    if (m2 < 0) m2 = 0;
    if (state->n == 0) {
        *state = {n, mean, m2};
        return;
    }
    double total = state->n + n, step = mean - state->mean;
    state->m2 += m2 + step * step * (state->n / total * n);
    state->mean += step * (n / total);
    state->n = total;
}

// Count a run's matches and merge their moments: those of the silent, then those of the firing.
static void add_matches(const double *match, const float *z, int64_t n, uint32_t *count, MatchMoments *moments) {
    count_matches(match, z, n, count);
    double centre[2] = {moments[0].mean, moments[1].mean};
    MatchSums sums = match_sums(match, z, n, centre[0], centre[1]);
    bool far = false;
    for (int i = 0; i < 2; i++)
        if (sums.n[i] && is_far(sums.n[i], sums.s1[i], sums.s2[i])) {
            centre[i] += sums.s1[i] / sums.n[i];
            far = true;
        }
    if (far) sums = match_sums(match, z, n, centre[0], centre[1]);
    for (int i = 0; i < 2; i++) merge_matches(moments + i, sums.n[i], centre[i], sums.s1[i], sums.s2[i]);
}

// Add a unit's counts of a batch to its bins and clear them.
static void fold_matches(uint32_t *count, int64_t *bin, int64_t *undefined) {
    for (int b = 0; b < 2 * MATCH_BINS; b++) bin[b] += count[b];
    *undefined += count[2 * MATCH_BINS];
    memset(count, 0, (2 * MATCH_BINS + 1) * sizeof *count);
}
