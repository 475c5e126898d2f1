// How well inputs match patterns, as kernels/match.py and kernels/matchbins.py define it, operation by operation.

#pragma once

#include "moments.h"

// MATCH_SIDE, MATCH_BITS and MATCH_BELOW are kernels/matchbins.py's SIDE, MANTISSA_BITS and BELOW
static const int MATCH_BINS = 2 * MATCH_SIDE;
static const int MATCH_SHIFT = 52 - MATCH_BITS;
static const int64_t MATCH_LEAST = (1023 << MATCH_BITS) + MATCH_BELOW;
static_assert(MATCH_SIDE < MATCH_STEP, "one place more than bins, for a match of 1");

// Eight units' −b and w̄, and 1/‖w − w̄‖ or 1/‖w‖; NaN where undefined. Of one unit: Pattern<double>.
template <class Double>
struct Pattern {
    Double bias, mean, scale;
};

// Moments of the matches of the silent, then of the firing, in the order of native_task.py's MATCH_MOMENTS
enum { MATCH_N, MATCH_MEAN, MATCH_M2, MATCH_MOMENTS };

static inline d8 like(d8, double v) { return all(v); }
static inline double like(double, double v) { return v; }
static inline double larger(double a, double b) { return a > b ? a : b; }
static inline double smaller(double a, double b) { return a < b ? a : b; }

// CENTRED: the correlation, else the cosine. `length` is 1/‖x − x̄‖ or 1/‖x‖, NaN where undefined; so is the match.
template <bool CENTRED, class Double>
static inline Double match_of(Double y, Double sum, Double length, const Pattern<Double> &pattern) {
    Double value = y + pattern.bias;
    if (CENTRED) value = value - sum * pattern.mean;
    value = value * pattern.scale * length;
    // of one and NaN the second, which is NaN
    return smaller(like(value, 1), larger(like(value, -1), value));
}

// What a form of match is computed of: y, and Σx and 1/‖x − x̄‖ or 1/‖x‖ of each presentation (APART: of each unit).
struct Inputs {
    const float *y, *z;
    const double *sum, *length;
};

// Whether no match of a block is undefined: y is finite.
static bool are_defined(const double *length, int64_t n, d8 scale) {
    d8 sums[4] = {scale};
    int64_t p = 0;
    for (; p + 4 * LANES <= n; p += 4 * LANES)
        for (int i = 0; i < 4; i++) sums[i] += load<d8>(length + p + LANES * i);
    double rest = 0;
    for (; p < n; p++) rest += length[p];
    return is_finite(rest) && lanes_of(is_finite((sums[0] + sums[1]) + (sums[2] + sums[3]))) == (1 << LANES) - 1;
}

// Of the silent and of the firing, where the match is defined: how many, Σ(m − centre) and Σ(m − centre)².
struct MatchSums {
    l8 n[2];
    d8 s1[2], s2[2];
};

template <bool APART>
static inline d8 of_presentation(const double *x, int64_t p) { return APART ? load<d8>(x + LANES * p) : all(x[p]); }

// Places of matches among the counts of their units, some presentations at a time: counted apart from where they are
// computed, a place is known long before its count is read.
struct Places {
    static const int64_t MOST = 64;
    int64_t n;
    alignas(64) int64_t at[MOST * LANES];

    void add(d8 value, l8 known, l8 fired) {
        const d8 floor = double_of(all(MATCH_LEAST << MATCH_SHIFT));
        l8 place = (bits_of(larger(absolute(value), floor)) >> MATCH_SHIFT) - all(MATCH_LEAST);
        place = place + (as_signed(as_unsigned(bits_of(value)) >> 56) & all((int64_t)MATCH_STEP));
        place = place + (fired & all((int64_t)(2 * MATCH_STEP)));
        store(at + LANES * n++, select(known, place, all((int64_t)(4 * MATCH_STEP))));
    }

    void count(Counts *counts, int form) {
        for (int64_t p = 0; p < n; p++)
            for (int lane = 0; lane < LANES; lane++) counts[lane].match[form][at[LANES * p + lane]]++;
        n = 0;
    }
};

// What to do with matches: add them up, count them, find each row's best; whether they are known to be defined.
enum { SUMMED = 1, COUNTED = 2, RANKED = 4, KNOWN = 8 };

// Add up the matches of a block, count them, and find each row's best.
template <bool CENTRED, bool APART, int WHAT>
static MatchSums sweep_matches(const Values &rows, const Inputs &x, const Pattern<d8> &pattern, const d8 *centre,
                               Counts *counts, double *best) {
    MatchSums sums = {};
    Places places;
    places.n = 0;
    const d8 zero = {};
    const l8 every = all((int64_t)-1);
    for (int64_t r = 0; r < rows.rows; r++) {
        d8 high = all(-__builtin_inf());
        for (int64_t p = rows.first[r]; p < rows.first[r + 1]; p++) {
            d8 sum = CENTRED ? of_presentation<APART>(x.sum, p) : zero;
            d8 value = match_of<CENTRED>(widened(load<f8>(x.y + LANES * p)), sum, of_presentation<APART>(x.length, p), pattern);
            // NaN, where undefined, is never greater
            if (WHAT & RANKED) high = larger(value, high);
            if (!(WHAT & SUMMED)) continue;
            l8 fired = widened(load<f8>(x.z + LANES * p)) > zero, known = WHAT & KNOWN ? every : value == value;
            d8 rest = value - select(fired, centre[1], centre[0]);
            if (!(WHAT & KNOWN)) rest = select(known, rest, zero);
            d8 square = rest * rest;
            l8 which[2] = {known ^ (known & fired), known & fired};
            for (int i = 0; i < 2; i++) {
                if (i || !(WHAT & KNOWN)) sums.n[i] = select(which[i], sums.n[i] + all((int64_t)1), sums.n[i]);
                sums.s1[i] = select(which[i], sums.s1[i] + rest, sums.s1[i]);
                sums.s2[i] = select(which[i], sums.s2[i] + square, sums.s2[i]);
            }
            if (!(WHAT & COUNTED)) continue;
            places.add(value, known, fired);
            if (places.n == Places::MOST) places.count(counts, CENTRED ? PEARSON : COSINE);
        }
        if (WHAT & RANKED) store(best + LANES * r, high);
    }
    if (WHAT & COUNTED) places.count(counts, CENTRED ? PEARSON : COSINE);
    if (WHAT & KNOWN) sums.n[0] = all(rows.n) - sums.n[1];
    return sums;
}

static void merge_matches(const Numbers &state, l8 active, l8 n_block, d8 centre, d8 s1, d8 s2) {
    active = active & (n_block > l8{});
    d8 n = widened(n_block), d = s1 / n, m2 = larger(s2 - s1 * d, d8{}), mean = centre + d;
    // of units that have seen nothing all numbers are 0
    d8 total = state[MATCH_N] + n, step = mean - state[MATCH_MEAN];
    state.set(MATCH_M2, active, state[MATCH_M2] + m2 + step * step * (state[MATCH_N] / total * n));
    state.set(MATCH_MEAN, active, state[MATCH_MEAN] + step * (n / total));
    state.set(MATCH_N, active, total);
}

// Merge a block's matches of one form into the moments of its units, and find each row's best if they are RANKED.
template <bool CENTRED, bool APART, int WHAT>
static void add_matches(const Values &rows, const Inputs &x, const Pattern<d8> &pattern, l8 active,
                        const Numbers state[2], Counts *counts, double *best) {
    d8 centre[2] = {state[0][MATCH_MEAN], state[1][MATCH_MEAN]};
    MatchSums sums = sweep_matches<CENTRED, APART, SUMMED | COUNTED | WHAT>(rows, x, pattern, centre, counts, best);
    bool again = false;
    for (int i = 0; i < 2; i++) {
        d8 n = widened(sums.n[i]), d = sums.s1[i] / n;
        l8 far = active & (d * d * n > all(FAR) * (sums.s2[i] - d * sums.s1[i]));
        centre[i] = select(far, centre[i] + d, centre[i]);
        again |= lanes_of(far) != 0;
    }
    if (again) sums = sweep_matches<CENTRED, APART, SUMMED | (WHAT & KNOWN)>(rows, x, pattern, centre, counts, best);
    for (int i = 0; i < 2; i++) merge_matches(state[i], active, sums.n[i], centre[i], sums.s1[i], sums.s2[i]);
}

// Add some counts to bins that rise, or fall, from the first.
template <int STEP>
static inline void add_counts(const uint32_t *count, int32_t *bin, int64_t n) {
    if (n == LANES)
        for (int i = 0; i < LANES; i++) bin[STEP * i] += count[i];
    else
        for (int64_t i = 0; i < n; i++) bin[STEP * i] += count[i];
}

// Add a unit's counts of a batch to its bins (those of the silent, then of the firing) and clear them.
static void fold_matches(uint32_t *count, int32_t *bin, int64_t *undefined) {
    for (int side = 0; side < 4; side++, count += MATCH_STEP) {
        // 1 itself is in the last bin
        count[MATCH_SIDE - 1] += count[MATCH_SIDE], count[MATCH_SIDE] = 0;
        int32_t *first = bin + side / 2 * MATCH_BINS + MATCH_SIDE;
        for (int group = 0; group < MATCH_SIDE; group += LANES) {
            if (are_zero(count + group)) continue;
            int64_t n = MATCH_SIDE - group < LANES ? MATCH_SIDE - group : LANES;
            if (side % 2)
                add_counts<-1>(count + group, first - 1 - group, n);
            else
                add_counts<1>(count + group, first + group, n);
            memset(count + group, 0, LANES * sizeof *count);
        }
    }
    *undefined += *count;
    *count = 0;
}
