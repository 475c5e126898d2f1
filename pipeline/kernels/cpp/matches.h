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

// Between −1 and 1.
template <class Double>
static inline Double clamped(Double value) {
    // of one and NaN the second, which is NaN
    return smaller(like(value, 1), larger(like(value, -1), value));
}

// CENTRED: the correlation, else the cosine, not yet clamped. `length` is 1/‖x − x̄‖ or 1/‖x‖, NaN where undefined; so is
// the match.
template <bool CENTRED, class Double>
static inline Double match_of(Double y, Double sum, Double length, const Pattern<Double> &pattern) {
    Double value = y + pattern.bias;
    if (CENTRED) value = value - sum * pattern.mean;
    return value * pattern.scale * length;
}

// What matches are computed of: y, and Σx, 1/‖x − x̄‖ and 1/‖x‖ of each presentation (APART: of each unit).
struct Inputs {
    const float *y, *z;
    int64_t step;  // numbers from one presentation to the next, of both
    const double *sum, *const *length;
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

// The upper halves of eight doubles, or of eight masks.
static inline w8 upper_of(d8 v) {
    f8 half[2];
    memcpy(half, &v, sizeof half);
    return (w8)SHUFFLE(half[0], half[1], 1, 3, 5, 7, 9, 11, 13, 15);
}

// Places of matches among the counts of their units. They are counted some presentations after they were computed: a
// place is known long before its count is read, and counting, which is no vector's work, is done beside the vectors'.
// All bits that a place depends on are in a double's upper half.
struct Places {
    static const int64_t BEHIND = 8;
    alignas(64) int32_t at[FORMS][BEHIND * LANES];

    // Nothing is behind yet.
    void begin() {
        for (int form = 0; form < FORMS; form++)
            for (int i = 0; i < BEHIND * LANES; i++) at[form][i] = MATCH_NOWHERE;
    }

    void set(int form, int64_t slot, d8 value, l8 known, w8 fired) {
        static_assert(MATCH_SHIFT > 32 && MATCH_STEP == 1 << 7, "the sign, shifted by 24, is a step");
        const w8 floor = w8{} + (int32_t)(MATCH_LEAST << (MATCH_SHIFT - 32)), none = w8{} + 4 * MATCH_STEP;
        w8 upper = upper_of(value), magnitude = upper & INT32_MAX;
        magnitude = magnitude > floor ? magnitude : floor;
        w8 place = (magnitude >> (MATCH_SHIFT - 32)) - (int32_t)MATCH_LEAST;
        place = place + (upper >> 24 & MATCH_STEP) + (fired & 2 * MATCH_STEP);
        store(at[form] + LANES * slot, upper_of(double_of(known)) ? place : none);
    }

    void count(Counts *counts, int form, int64_t slot) const {
        uint64_t pair[LANES / 2];
        memcpy(pair, at[form] + LANES * slot, sizeof pair);
        for (int half = 0; half < LANES / 2; half++) {
            counts[2 * half].match[form][(uint32_t)pair[half]]++;
            counts[2 * half + 1].match[form][pair[half] >> 32]++;
        }
    }
};

// What to do with matches: add them up, count them, find each row's best; whether they are known to be defined.
enum { SUMMED = 1, COUNTED = 2, RANKED = 4, KNOWN = 8 };
// Which forms of match, a bit for each.
enum { CORRELATIONS = 1 << PEARSON, COSINES = 1 << COSINE };

template <bool APART, int WHICH>
static inline void match_forms(const Inputs &x, int64_t p, const Pattern<d8> *pattern, d8 value[FORMS]) {
    d8 y = widened(load<f8>(x.y + x.step * p));
    if (WHICH & CORRELATIONS)
        value[PEARSON] = match_of<true>(y, of_presentation<APART>(x.sum, p),
                                        of_presentation<APART>(x.length[PEARSON], p), pattern[PEARSON]);
    if (WHICH & COSINES)
        value[COSINE] = match_of<false>(y, d8{}, of_presentation<APART>(x.length[COSINE], p), pattern[COSINE]);
}

// Take one form's matches in, `fired` where the unit fires; their number only if it is not KNOWN.
template <int WHAT>
static inline void add_values(MatchSums &sums, d8 value, l8 known, l8 fired, const d8 *centre) {
    d8 rest = value - select(fired, centre[1], centre[0]);
    if (!(WHAT & KNOWN)) rest = select(known, rest, d8{});
    d8 square = rest * rest;
    l8 which[2] = {known ^ (known & fired), known & fired};
    for (int i = 0; i < 2; i++) {
        if (!(WHAT & KNOWN)) sums.n[i] = select(which[i], sums.n[i] + all((int64_t)1), sums.n[i]);
        sums.s1[i] = select(which[i], sums.s1[i] + rest, sums.s1[i]);
        sums.s2[i] = select(which[i], sums.s2[i] + square, sums.s2[i]);
    }
}

// Add up the matches of a block, count them, and find each row's best correlation.
template <bool APART, int WHICH, int WHAT>
static void sweep_matches(const Values &rows, const Inputs &x, const Pattern<d8> *pattern, const d8 (*centre)[2],
                          Counts *counts, double *best, MatchSums *sums_F) {
    MatchSums sums[FORMS] = {};
    Places places;
    auto count = [&](int64_t slot) {
        for (int form = 0; form < FORMS; form++)
            if (WHICH >> form & 1) places.count(counts, form, slot);
    };
    if (WHAT & COUNTED) places.begin();
    const l8 every = all((int64_t)-1);
    const d8 none = all(-__builtin_inf());
    l8 n_fired = {};
    for (int64_t r = 0; r < rows.rows; r++) {
        d8 high = none;
        for (int64_t p = rows.first[r]; p < rows.first[r + 1]; p++) {
            d8 value[FORMS];
            match_forms<APART, WHICH>(x, p, pattern, value);
            // NaN, where undefined, is never greater
            if (WHAT & RANKED) high = larger(value[PEARSON], high);
            if (!(WHAT & SUMMED)) continue;
            f8 z = load<f8>(x.z + x.step * p);
            l8 fired = widened(z) > d8{};
            if (WHAT & KNOWN) n_fired = select(fired, n_fired + all((int64_t)1), n_fired);
            int64_t slot = p & (Places::BEHIND - 1);
            if (WHAT & COUNTED) count(slot);
            for (int form = 0; form < FORMS; form++) {
                if (!(WHICH >> form & 1)) continue;
                value[form] = clamped(value[form]);
                l8 known = WHAT & KNOWN ? every : value[form] == value[form];
                add_values<WHAT>(sums[form], value[form], known, fired, centre[form]);
                if (WHAT & COUNTED) places.set(form, slot, value[form], known, (w8)(z > f8{}));
            }
        }
        if (WHAT & RANKED) store(best + LANES * r, select(high > none, clamped(high), none));
    }
    if (WHAT & COUNTED)
        for (int64_t slot = 0; slot < Places::BEHIND; slot++) count(slot);
    for (int form = 0; form < FORMS; form++) {
        if (WHAT & KNOWN) sums[form].n[0] = all(rows.n) - n_fired, sums[form].n[1] = n_fired;
        if (WHICH >> form & 1) sums_F[form] = sums[form];
    }
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

// Sum a form anew around the means of the block where they are too far from the centres.
template <bool APART, int FORM, int WHAT>
static void sum_near(const Values &rows, const Inputs &x, const Pattern<d8> *pattern, l8 active, d8 (*centre)[2],
                     MatchSums *sums) {
    bool again = false;
    for (int i = 0; i < 2; i++) {
        d8 n = widened(sums[FORM].n[i]), d = sums[FORM].s1[i] / n;
        l8 far = active & (d * d * n > all(FAR) * (sums[FORM].s2[i] - d * sums[FORM].s1[i]));
        centre[FORM][i] = select(far, centre[FORM][i] + d, centre[FORM][i]);
        again |= lanes_of(far) != 0;
    }
    if (again) sweep_matches<APART, 1 << FORM, SUMMED | (WHAT & KNOWN)>(rows, x, pattern, centre, 0, 0, sums);
}

// Merge a block's matches into the moments of its units, and find each row's best correlation if they are RANKED.
template <bool APART, int WHICH, int WHAT>
static void add_matches(const Values &rows, const Inputs &x, const Pattern<d8> *pattern, l8 active,
                        const Numbers (*state)[2], Counts *counts, double *best) {
    d8 centre[FORMS][2] = {};
    MatchSums sums[FORMS] = {};
    for (int form = 0; form < FORMS; form++)
        if (WHICH >> form & 1)
            for (int i = 0; i < 2; i++) centre[form][i] = state[form][i][MATCH_MEAN];
    sweep_matches<APART, WHICH, SUMMED | COUNTED | WHAT>(rows, x, pattern, centre, counts, best, sums);
    if (WHICH & CORRELATIONS) sum_near<APART, PEARSON, WHAT>(rows, x, pattern, active, centre, sums);
    if (WHICH & COSINES) sum_near<APART, COSINE, WHAT>(rows, x, pattern, active, centre, sums);
    for (int form = 0; form < FORMS; form++)
        if (WHICH >> form & 1)
            for (int i = 0; i < 2; i++)
                merge_matches(state[form][i], active, sums[form].n[i], centre[form][i], sums[form].s1[i],
                              sums[form].s2[i]);
}

// The same of one form after the other: where some matches are undefined, or one form alone is wanted.
template <bool APART>
static void add_forms(const Values &rows, const Inputs &x, const Pattern<d8> *pattern, l8 active,
                          const Numbers (*state)[2], Counts *counts, double *best, int wanted, bool ranked) {
    if (wanted & CORRELATIONS)
        (ranked ? add_matches<APART, CORRELATIONS, RANKED> : add_matches<APART, CORRELATIONS, 0>)(
            rows, x, pattern, active, state, counts, best);
    if (wanted & COSINES) add_matches<APART, COSINES, 0>(rows, x, pattern, active, state, counts, best);
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
