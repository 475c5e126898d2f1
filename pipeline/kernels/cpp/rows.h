// What is kept of rows: sums by class, and the rows that stand for a unit (kernels/classsums.py, kernels/ranked.py).
//
// A row comes with the greatest and smallest z of its presentations, the greatest a and the best match, of eight units
// side by side. Where they stand is looked up only if the row is kept, which after a few batches is rare.

#pragma once

#include "matches.h"

enum Kind { GREATEST, SMALLEST, MATCH, RANDOM, OCTAVE, KINDS };
// LEAST_OCTAVE and LAST_OCTAVE are those of kernels/ranked.py
static const int STRATA = 2 * (LAST_OCTAVE - LEAST_OCTAVE + 1);

// The presentations of some rows to eight units, side by side, `step` numbers from one to the next.
//
// Σx and lengths are as in matches.h, of each unit if they are `apart`. Presentation p is number start + p of the batch,
// or start + where[p] where some were left out; the block's first row is row `row` of the batch. Units that are not
// active are no part of it.
struct Block {
    const float *z, *a, *y;
    int64_t step;
    const double *sum, *length[FORMS];
    const int64_t *first, *where;
    int64_t n, rows, row, start, unit;
    l8 active;
    bool rectified, apart, ranked;                         // ranked: each row's best match has been found
    float *greatest, *smallest, *output, *least_output;  // of each row; −∞ (∞) where it has none
    double *match;
    Ahead ahead[2];  // of z and a

    double input(const double *x, int64_t p, int lane) const { return x[apart ? LANES * p + lane : p]; }
};

// The last place of a kind, or of an octave, of eight units: which row is there. What is kept is far apart in memory, and
// most rows are refused by these.
struct Last {
    int64_t key[LANES], uid[LANES];
};

// The rows kept of one unit: of equal keys the smaller uid first, unused places, with the last of all keys, at the end.
struct Kept {
    Last *last;
    int64_t *key, *uid, *position;
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

static inline l8 octaves_of(d8 z) {
    const l8 least = all((int64_t)LEAST_OCTAVE), last = all((int64_t)LAST_OCTAVE);
    l8 octave = ((bits_of(z) & all(INT64_MAX)) >> 52) - all((int64_t)1023);
    octave = select(octave < least, least, select(octave > last, last, octave));
    return select(z < d8{}, last - octave, all((int64_t)STRATA / 2) + octave - least);
}

// One unit of a block.
struct Unit {
    const Block &block;
    const Keeping &keeping;
    int lane;
    Pattern<double> pattern;
    Kept kept;

    double pearson(int64_t p) const {
        double y = block.y[block.step * p + lane];
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
            float z = block.z[block.step * p + lane];
            bool here = kind == SMALLEST ? z == block.smallest[row]
                        : kind == MATCH  ? pearson(p) == block.match[row]
                                         : z == block.greatest[row];
            if (!here) continue;
            int64_t called = number(p);
            if (best < 0 || called < smallest) best = p, smallest = called;
        }
        return best;
    }

    // Keep row r if its key is among the k smallest of its kind and stratum; `where` is asked where the row stands.
    template <class Where>
    void offer(int64_t r, int kind, int64_t stratum, int64_t key, Where where) const {
        Last &last = kept.last[kind + stratum];
        int64_t uid = keeping.uid[block.row + r];
        if (key > last.key[lane] || (key == last.key[lane] && uid >= last.uid[lane])) return;
        int64_t k = keeping.k[kind], first = keeping.first[kind] + stratum * k, at = first + k - 1;
        for (; at > first; at--) {
            if (key > kept.key[at - 1] || (key == kept.key[at - 1] && uid > kept.uid[at - 1])) break;
            kept.key[at] = kept.key[at - 1];
            kept.uid[at] = kept.uid[at - 1];
            kept.position[at] = kept.position[at - 1];
            memcpy(kept.value + 3 * at, kept.value + 3 * (at - 1), 3 * sizeof(double));
        }
        int64_t p = where();
        float z = block.z[block.step * p + lane];
        kept.key[at] = key;
        kept.uid[at] = uid;
        kept.position[at] = number(p);
        kept.value[3 * at] = z;
        kept.value[3 * at + 1] = block.rectified ? (z > 0 ? z : 0) : block.a[block.step * p + lane];
        kept.value[3 * at + 2] = pearson(p);
        last.key[lane] = kept.key[first + k - 1], last.uid[lane] = kept.uid[first + k - 1];
    }
};

static inline l8 keys_of(d8 v) {
    l8 bits = bits_of(v + d8{});
    return bits ^ ((bits >> 63) & all(INT64_MAX));
}

// Where a row stands for eight units, by kind; looked for once one of them keeps it, for all of them: at first all do.
struct Standing {
    const Unit *units;
    int64_t r, at[3][LANES], times[3][LANES];
    bool looked[3];

    int64_t of(int kind, int lane) {
        if (!looked[kind]) look(kind);
        // of several places the one with the smallest number
        if (times[kind][lane] > 1) at[kind][lane] = units[lane].place(r, kind), times[kind][lane] = 1;
        return at[kind][lane];
    }

    void look(int kind) {
        const Block &block = units->block;
        looked[kind] = true;
        if (kind != MATCH)
            look_among_values(block, kind, (kind == SMALLEST ? block.smallest : block.greatest) + LANES * r);
        else if (block.apart)
            look_among_matches<true>(block);
        else
            look_among_matches<false>(block);
    }

    void look_among_values(const Block &block, int kind, const float *extreme) {
        const int64_t begin = block.first[r];
        w8 place = {}, count = {};
        for (int64_t p = begin; p < block.first[r + 1]; p++) {
            w8 here = (w8)(load<f8>(block.z + block.step * p) == load<f8>(extreme));
            place = here ? w8{} + (int32_t)(p - begin) : place;
            count = count - here;
        }
        for (int lane = 0; lane < LANES; lane++) at[kind][lane] = begin + place[lane], times[kind][lane] = count[lane];
    }

    template <bool APART>
    void look_among_matches(const Block &block) {
        double bias[LANES], mean[LANES], scale[LANES];
        for (int lane = 0; lane < LANES; lane++) {
            const Pattern<double> &of = units[lane].pattern;
            bias[lane] = of.bias, mean[lane] = of.mean, scale[lane] = of.scale;
        }
        const Pattern<d8> pattern = {load<d8>(bias), load<d8>(mean), load<d8>(scale)};
        const d8 best = load<d8>(block.match + LANES * r);
        l8 place = {}, count = {};
        for (int64_t p = block.first[r]; p < block.first[r + 1]; p++) {
            d8 value = match_of<true>(widened(load<f8>(block.y + block.step * p)), of_presentation<APART>(block.sum, p),
                                      of_presentation<APART>(block.length[PEARSON], p), pattern);
            l8 here = clamped(value) == best;
            place = select(here, all(p), place);
            count = count - here;
        }
        store(at[MATCH], place), store(times[MATCH], count);
    }
};

// Which of eight rows come before the last ones kept.
static inline l8 precede(l8 key, l8 uid, const Last &last) {
    l8 bound = load<l8>(last.key);
    return (key < bound) | ((key == bound) & (uid < load<l8>(last.uid)));
}

// The same for the octaves of eight rows.
static inline int precede_in_octaves(d8 z, l8 key, int64_t uid, const Last *last) {
    int64_t octave[LANES], keys[LANES];
    int chosen = 0;
    store(octave, octaves_of(z)), store(keys, key);
    for (int lane = 0; lane < LANES; lane++) {
        const Last &of = last[OCTAVE + octave[lane]];
        chosen |= (keys[lane] < of.key[lane] || (keys[lane] == of.key[lane] && uid < of.uid[lane])) << lane;
    }
    return chosen;
}

// Offer the rows of a block to its units. Most are refused by one comparison of eight keys with the last ones kept.
static void keep_rows(const Block &block, const Keeping &keeping, const Unit *units) {
    const int active = lanes_of(block.active);
    const Last *last = units[0].kept.last;
    uint64_t number[LANES];
    for (int lane = 0; lane < LANES; lane++) number[lane] = block.unit + lane;
    u8 start = splitmix64(splitmix64(all((uint64_t)keeping.seed)) + load<u8>(number));
    bool drawn = keeping.k[RANDOM] || keeping.k[OCTAVE];
    for (int64_t r = 0; r < block.rows; r++) {
        if (block.first[r] == block.first[r + 1]) continue;
        d8 greatest = widened(load<f8>(block.greatest + LANES * r)), smallest = widened(load<f8>(block.smallest + LANES * r));
        d8 match = load<d8>(block.match + LANES * r);
        l8 key[3] = {keys_of(-greatest), keys_of(smallest), keys_of(-match)};
        l8 uid = all(keeping.uid[block.row + r]), hash = {}, fired = greatest > d8{};
        l8 ranked = precede(key[GREATEST], uid, last[GREATEST]) | precede(key[SMALLEST], uid, last[SMALLEST]) |
                    (precede(key[MATCH], uid, last[MATCH]) & is_finite(match));
        int chosen = 0;
        if (drawn) {
            hash = as_signed(splitmix64(start ^ as_unsigned(uid)));
            ranked = ranked | (fired & precede(hash, uid, last[RANDOM]));
            chosen = precede_in_octaves(greatest, hash, keeping.uid[block.row + r], last);
        }
        chosen |= lanes_of(ranked);
        chosen &= active;
        if (!chosen) continue;
        const int defined = lanes_of(is_finite(match)), firing = lanes_of(fired);
        Standing standing = {units, r};
        int64_t keys[3][LANES], hashes[LANES], octave[LANES];
        for (int kind = 0; kind < 3; kind++) store(keys[kind], key[kind]);
        store(hashes, hash), store(octave, octaves_of(greatest));
        for (int lane = 0; lane < LANES; lane++) {
            if (!(chosen >> lane & 1)) continue;
            const Unit &unit = units[lane];
            auto greatest_z = [&] { return standing.of(GREATEST, lane); };
            auto smallest_z = [&] { return standing.of(SMALLEST, lane); };
            auto best_match = [&] { return standing.of(MATCH, lane); };
            unit.offer(r, GREATEST, 0, keys[0][lane], greatest_z);
            unit.offer(r, SMALLEST, 0, keys[1][lane], smallest_z);
            if (defined >> lane & 1) unit.offer(r, MATCH, 0, keys[2][lane], best_match);
            if (drawn) {
                // what is drawn stands where z is greatest
                if (firing >> lane & 1) unit.offer(r, RANDOM, 0, hashes[lane], greatest_z);
                unit.offer(r, OCTAVE, octave[lane], hashes[lane], greatest_z);
            }
        }
    }
}

// Rows, firing rows, mean and Σ(a − ā)² of the greatest a of a row, by class, of eight units.
struct ByClass {
    int64_t *n, *fired;
    double *mean, *m2;
};

static void add_classes(const Block &block, const int64_t *label, const ByClass &sums) {
    const l8 one = all((int64_t)1) & block.active;
    for (int64_t r = 0; r < block.rows; r++) {
        int64_t of = label[block.row + r];
        if (of < 0 || block.first[r] == block.first[r + 1]) continue;
        of *= LANES;
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
