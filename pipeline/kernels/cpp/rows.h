// What is kept of rows: sums by class, and the rows that stand for a unit (kernels/classsums.py, kernels/ranked.py).
//
// A row comes with the greatest and smallest z of its presentations, the greatest a and the best match, of eight units
// side by side. Where they stand is looked up only if the row is kept, which after a few batches is rare.

#pragma once

#include "matches.h"

enum Kind { GREATEST, SMALLEST, MATCH, RANDOM, OCTAVE, KINDS };
// LEAST_OCTAVE and LAST_OCTAVE are those of kernels/ranked.py
static const int STRATA = 2 * (LAST_OCTAVE - LEAST_OCTAVE + 1);

// The presentations of some rows to eight units, side by side.
//
// Σx and lengths are as in matches.h, of each unit if they are `apart`. Presentation p is number start + p of the batch,
// or start + where[p] where some were left out; the block's first row is row `row` of the batch. Units that are not
// active are no part of it.
struct Block {
    const float *z, *a, *y;
    const double *sum, *length[FORMS];
    const int64_t *first, *where;
    int64_t n, rows, row, start, unit;
    l8 active;
    bool rectified, apart;
    float *greatest, *smallest, *output;  // of each row; −∞ (∞) where it has none
    double *match;
    Ahead ahead[2];  // of z and a

    double input(const double *x, int64_t p, int lane) const { return x[apart ? LANES * p + lane : p]; }
};

// The rows kept of one unit: of equal keys the smaller uid first, unused places, with the last of all keys, at the end.
// The key of the last place of a kind, or of an octave, lies in `bound`, `step` from one to the next: those of eight
// units are one line of memory, where their lists are far apart.
struct Kept {
    int64_t *bound, step, *key, *uid, *position;
    double *value;  // z, a, correlation
};

// How many of each kind are kept, and where their places begin; how the batch's rows and positions are called.
struct Keeping {
    int64_t seed, first[KINDS], k[KINDS];
    const int64_t *uid, *number;
    int64_t positions;
};

template <class Bits>
static inline Bits shifted(Bits v, int by) { return v ^ (v >> by); }

static inline u8 splitmix64(u8 value) {
    u8 z = value + all((uint64_t)0x9E3779B97F4A7C15u);
    z = shifted(z, 30) * all((uint64_t)0xBF58476D1CE4E5B9u);
    z = shifted(z, 27) * all((uint64_t)0x94D049BB133111EBu);
    return shifted(z, 31) & all((uint64_t)INT64_MAX);
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

// One unit of a block.
struct Unit {
    const Block &block;
    const Keeping &keeping;
    int lane;
    Pattern<double> pattern;
    Kept kept;

    double pearson(int64_t p) const {
        double y = block.y[LANES * p + lane];
        return clamped(
            match_of<true>(y, block.input(block.sum, p, lane), block.input(block.length[PEARSON], p, lane), pattern));
    }

    int64_t number(int64_t p) const {
        int64_t at = block.start + (block.where ? block.where[p] : p);
        return keeping.number ? keeping.number[at] : at % keeping.positions;
    }

    // The presentation that stands for a row: where its extreme is, of equals the one with the smallest number.
    int64_t place(int64_t r, int kind) const {
        int64_t best = -1, smallest = 0, row = LANES * r + lane;
        for (int64_t p = block.first[r]; p < block.first[r + 1]; p++) {
            float z = block.z[LANES * p + lane];
            bool here = kind == SMALLEST ? z == block.smallest[row]
                        : kind == MATCH  ? pearson(p) == block.match[row]
                                         : z == block.greatest[row];
            if (!here) continue;
            int64_t called = number(p);
            if (best < 0 || called < smallest) best = p, smallest = called;
        }
        return best;
    }

    // Keep row r if its key is among the k smallest of its kind and stratum. `place_` is where the row's presentation of
    // the kind stands, −1 as long as it is not known.
    void offer(int64_t r, int kind, int64_t stratum, int64_t key, int64_t &place_) const {
        int64_t *bound = kept.bound + (kind + stratum) * kept.step, uid = keeping.uid[block.row + r];
        if (key > *bound) return;
        int64_t k = keeping.k[kind], first = keeping.first[kind] + stratum * k, at = first + k - 1;
        if (key == *bound && uid >= kept.uid[at]) return;
        for (; at > first; at--) {
            if (key > kept.key[at - 1] || (key == kept.key[at - 1] && uid > kept.uid[at - 1])) break;
            kept.key[at] = kept.key[at - 1];
            kept.uid[at] = kept.uid[at - 1];
            kept.position[at] = kept.position[at - 1];
            memcpy(kept.value + 3 * at, kept.value + 3 * (at - 1), 3 * sizeof(double));
        }
        int64_t p = place_ = place_ < 0 ? place(r, kind) : place_;
        float z = block.z[LANES * p + lane];
        kept.key[at] = key;
        kept.uid[at] = uid;
        kept.position[at] = number(p);
        kept.value[3 * at] = z;
        kept.value[3 * at + 1] = block.rectified ? (z > 0 ? z : 0) : block.a[LANES * p + lane];
        kept.value[3 * at + 2] = pearson(p);
        *bound = kept.key[first + k - 1];
    }
};

static inline l8 keys_of(d8 v) {
    l8 bits = bits_of(v + d8{});
    return bits ^ ((bits >> 63) & all(INT64_MAX));
}

// Offer the rows of a block to its units. Most are refused by one comparison of eight keys with the last ones kept.
static void keep_rows(const Block &block, const Keeping &keeping, const Unit *units) {
    const int active = lanes_of(block.active);
    const int64_t *bound = units[0].kept.bound, step = units[0].kept.step;
    uint64_t number[LANES];
    for (int lane = 0; lane < LANES; lane++) number[lane] = block.unit + lane;
    u8 start = splitmix64(splitmix64(all((uint64_t)keeping.seed)) + load<u8>(number));
    bool drawn = keeping.k[RANDOM] || keeping.k[OCTAVE];
    for (int64_t r = 0; r < block.rows; r++) {
        if (block.first[r] == block.first[r + 1]) continue;
        d8 greatest = widened(load<f8>(block.greatest + LANES * r)), smallest = widened(load<f8>(block.smallest + LANES * r));
        d8 match = load<d8>(block.match + LANES * r);
        l8 key[3] = {keys_of(-greatest), keys_of(smallest), keys_of(-match)};
        l8 ranked[3] = {key[0] <= load<l8>(bound + GREATEST * step), key[1] <= load<l8>(bound + SMALLEST * step),
                        (key[2] <= load<l8>(bound + MATCH * step)) & is_finite(match)};
        int chosen = lanes_of(ranked[0] | ranked[1] | ranked[2]), firing = 0;
        int64_t hash[LANES], keys[3][LANES];
        double z[LANES];
        if (drawn) {
            l8 of_row = as_signed(splitmix64(start ^ all((uint64_t)keeping.uid[block.row + r])));
            l8 fired = greatest > d8{};
            store(hash, of_row), store(z, greatest);
            firing = lanes_of(fired);
            chosen |= lanes_of(fired & (of_row <= load<l8>(bound + RANDOM * step)));
            for (int lane = 0; lane < LANES; lane++)
                chosen |= (hash[lane] <= bound[(OCTAVE + octave_of(z[lane])) * step + lane]) << lane;
        }
        chosen &= active;
        if (!chosen) continue;
        const int defined = lanes_of(is_finite(match));
        for (int kind = 0; kind < 3; kind++) store(keys[kind], key[kind]);
        for (int lane = 0; lane < LANES; lane++) {
            if (!(chosen >> lane & 1)) continue;
            const Unit &unit = units[lane];
            // what is drawn stands where z is greatest
            int64_t at[3] = {-1, -1, -1};
            unit.offer(r, GREATEST, 0, keys[0][lane], at[0]);
            unit.offer(r, SMALLEST, 0, keys[1][lane], at[1]);
            if (defined >> lane & 1) unit.offer(r, MATCH, 0, keys[2][lane], at[2]);
            if (drawn) {
                if (firing >> lane & 1) unit.offer(r, RANDOM, 0, hash[lane], at[0]);
                unit.offer(r, OCTAVE, octave_of(z[lane]), hash[lane], at[0]);
            }
        }
    }
}

// Rows, firing rows, mean and Σ(a − ā)² of the greatest a of a row, by class, of eight units; `step` to the next class.
struct ByClass {
    int64_t *n, *fired;
    double *mean, *m2;
    int64_t step;
};

static void add_classes(const Block &block, const int64_t *label, const ByClass &sums) {
    const l8 one = all((int64_t)1) & block.active;
    for (int64_t r = 0; r < block.rows; r++) {
        int64_t of = label[block.row + r];
        if (of < 0 || block.first[r] == block.first[r + 1]) continue;
        of *= sums.step;
        l8 n = load<l8>(sums.n + of) + one;
        l8 fired = widened(load<f8>(block.greatest + LANES * r)) > d8{};
        d8 a = widened(load<f8>(block.output + LANES * r)), mean = load<d8>(sums.mean + of), rest = a - mean;
        d8 moved = mean + rest / widened(n), m2 = load<d8>(sums.m2 + of);
        store(sums.n + of, n);
        store(sums.fired + of, load<l8>(sums.fired + of) + (one & fired));
        store(sums.mean + of, select(block.active, moved, mean));
        store(sums.m2 + of, select(block.active, m2 + rest * (a - moved), m2));
    }
}
