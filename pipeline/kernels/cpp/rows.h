// What is kept of rows: sums by class, and the rows that stand for a unit (kernels/classsums.py, kernels/ranked.py).
//
// A row comes with the greatest and smallest z of its presentations, the greatest a and the best match. Where they stand
// is looked up only if the row is kept, which after a few batches is rare.

#pragma once

#include "matches.h"

enum Kind { GREATEST, SMALLEST, MATCH, RANDOM, OCTAVE, KINDS };
// LEAST_OCTAVE and LAST_OCTAVE are those of kernels/ranked.py
static const int STRATA = 2 * (LAST_OCTAVE - LEAST_OCTAVE + 1), COUNTS = OCTAVE + STRATA;

// The presentations of some rows to one unit.
//
// x's sums and lengths are as in matches.h. Presentation p is number start + p of the batch, or start + where[p] where
// some were left out; the run's first row is row `row` of the batch.
struct Run {
    const float *z, *a, *y;
    const double *sum, *pearson, *cosine;
    const int64_t *first, *where;
    int64_t n, rows, row, start;
    bool rectified;
    double *greatest, *smallest, *output, *match;  // of each row; −∞ (∞) where it has none
};

// The rows kept of one unit: of equal keys the smaller uid first, unused places at the end.
struct Kept {
    int64_t *count, *key, *uid, *position;
    double *value;  // z, a, correlation
};

// How many of each kind are kept, and where their places begin; how the batch's rows and positions are called.
struct Keeping {
    int64_t seed, first[KINDS], k[KINDS];
    const int64_t *uid, *number;
    int64_t positions;
};

static inline int64_t splitmix64(uint64_t value) {
    uint64_t z = value + 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return (z ^ (z >> 31)) & INT64_MAX;
}

// An integer in the order of the double, the same for both zeros.
static inline int64_t key_of(double v) {
    int64_t bits = bits_of(v + 0.0);
    return bits ^ ((bits >> 63) & INT64_MAX);
}

static inline int64_t octave_of(double z) {
    int64_t octave = ((bits_of(z) & INT64_MAX) >> 52) - 1023;
    octave = octave < LEAST_OCTAVE ? LEAST_OCTAVE : octave > LAST_OCTAVE ? LAST_OCTAVE : octave;
    return z < 0 ? LAST_OCTAVE - octave : STRATA / 2 + octave - LEAST_OCTAVE;
}

static inline double pearson_at(const Run &run, int64_t p, const Pattern &pattern) {
    return match_of<true>((double)run.y[p], run.sum[p], run.pearson[p], pattern);
}

static inline int64_t number_of(const Run &run, const Keeping &keeping, int64_t p) {
    int64_t at = run.start + (run.where ? run.where[p] : p);
    return keeping.number ? keeping.number[at] : at % keeping.positions;
}

// The presentation that stands for a row: where its extreme is, of equals the one with the smallest number.
static int64_t place_of(const Run &run, const Keeping &keeping, const Pattern &pattern, int64_t r, int kind) {
    int64_t best = -1, smallest = 0;
    for (int64_t p = run.first[r]; p < run.first[r + 1]; p++) {
        bool here = kind == SMALLEST  ? run.z[p] == run.smallest[r]
                    : kind == MATCH   ? pearson_at(run, p, pattern) == run.match[r]
                                      : run.z[p] == run.greatest[r];
        if (!here) continue;
        int64_t number = number_of(run, keeping, p);
        if (best < 0 || number < smallest) best = p, smallest = number;
    }
    return best;
}

// Keep row r if its key is among the k smallest of its kind and stratum.
static inline void offer(const Run &run, const Keeping &keeping, const Pattern &pattern, const Kept &kept, int64_t r,
                         int kind, int64_t stratum, int64_t key) {
    int64_t k = keeping.k[kind], first = keeping.first[kind] + stratum * k, uid = keeping.uid[run.row + r];
    int64_t *count = kept.count + kind + stratum, at = first + *count;
    if (k == 0) return;
    if (*count == k) {
        at--;
        if (key > kept.key[at] || (key == kept.key[at] && uid >= kept.uid[at])) return;
    } else {
        ++*count;
    }
    for (; at > first; at--) {
        if (key > kept.key[at - 1] || (key == kept.key[at - 1] && uid > kept.uid[at - 1])) break;
        kept.key[at] = kept.key[at - 1];
        kept.uid[at] = kept.uid[at - 1];
        kept.position[at] = kept.position[at - 1];
        memcpy(kept.value + 3 * at, kept.value + 3 * (at - 1), 3 * sizeof(double));
    }
    int64_t p = place_of(run, keeping, pattern, r, kind);
    kept.key[at] = key;
    kept.uid[at] = uid;
    kept.position[at] = number_of(run, keeping, p);
    kept.value[3 * at] = run.z[p];
    kept.value[3 * at + 1] = run.rectified ? (run.z[p] > 0 ? run.z[p] : 0) : run.a[p];
    kept.value[3 * at + 2] = pearson_at(run, p, pattern);
}

static void keep_rows(const Run &run, const Keeping &keeping, const Pattern &pattern, const Kept &kept, int64_t unit) {
    uint64_t start = splitmix64((uint64_t)splitmix64(keeping.seed) + unit);
    bool drawn = keeping.k[RANDOM] || keeping.k[OCTAVE];
    for (int64_t r = 0; r < run.rows; r++) {
        double greatest = run.greatest[r];
        if (run.first[r] == run.first[r + 1]) continue;
        offer(run, keeping, pattern, kept, r, GREATEST, 0, key_of(-greatest));
        offer(run, keeping, pattern, kept, r, SMALLEST, 0, key_of(run.smallest[r]));
        if (is_finite(run.match[r])) offer(run, keeping, pattern, kept, r, MATCH, 0, key_of(-run.match[r]));
        if (!drawn) continue;
        int64_t hash = splitmix64(start ^ (uint64_t)keeping.uid[run.row + r]);
        if (greatest > 0) offer(run, keeping, pattern, kept, r, RANDOM, 0, hash);
        offer(run, keeping, pattern, kept, r, OCTAVE, octave_of(greatest), hash);
    }
}

// Rows, firing rows, mean and Σ(a − ā)² of the greatest a of a row, by class, of one unit and one way to label rows.
struct ByClass {
    int64_t *n, *fired;
    double *mean, *m2;
};

static void add_classes(const Run &run, const int64_t *label, const ByClass &sums) {
    for (int64_t r = 0; r < run.rows; r++) {
        int64_t of = label[run.row + r];
        if (of < 0 || run.first[r] == run.first[r + 1]) continue;
        double n = (double)++sums.n[of], rest = run.output[r] - sums.mean[of];
        sums.fired[of] += run.greatest[r] > 0;
        sums.mean[of] += rest / n;
        sums.m2[of] += rest * (run.output[r] - sums.mean[of]);
    }
}

// The greatest (smallest, where SIGN is −1) value of each row.
template <int SIGN, class Number, class Vector>
static void extreme_by_row(const Number *value, const Run &run, double *extreme) {
    const int lanes = sizeof(Vector) / sizeof(Number);
    for (int64_t r = 0; r < run.rows; r++) {
        int64_t p = run.first[r], stop = run.first[r + 1];
        Number best = (Number)(-SIGN * __builtin_inf());
        if (stop - p >= 2 * lanes) {
            // from what no NaN is greater (smaller) than
            Vector all = Vector{} + best;
            for (; p + lanes <= stop; p += lanes) {
                Vector next = load<Vector>(value + p);
                all = SIGN > 0 ? larger(next, all) : smaller(next, all);
            }
            for (int lane = 0; lane < lanes; lane++)
                best = SIGN > 0 ? larger(all[lane], best) : smaller(all[lane], best);
        }
        for (; p < stop; p++) best = SIGN > 0 ? larger(value[p], best) : smaller(value[p], best);
        extreme[r] = best;
    }
}
