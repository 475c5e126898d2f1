// The histogram of z, as kernels/bins.py defines it.
//
// A block is counted in raw bins, the first bits of a float32: sign, exponent, BIN_BITS of the mantissa. Once per batch
// the raw bins of a unit are folded into the window that ends at its largest magnitude.

#pragma once

#include "vectors.h"

// KEPT and BIN_BITS are kernels/bins.py's KEPT and MANTISSA_BITS
static const int ZERO = KEPT + 1, BINS = 2 * (KEPT + 1) + 1;
static const int RAW_SIDE = 1 << (8 + BIN_BITS), RAW_SHIFT = 23 - BIN_BITS;
// lattice number of the raw bin 0
static const int RAW_LEAST = -(127 << BIN_BITS);
// MATCH_SIDE is that of kernels/matchbins.py; of each form the bins by sign and firing, then one for what is undefined
enum { PEARSON, COSINE, FORMS };
// and one that nobody reads
static const int MATCH_STEP = 128, MATCH_NOWHERE = 4 * MATCH_STEP + 1, MATCH_COUNTS = 4 * MATCH_STEP + 2;

// One unit's counts of a batch, and its largest and smallest magnitude; `tiny` are those of the raw bins 0 and −0 that
// have been looked at for zeros.
struct Counts {
    uint32_t raw[2 * RAW_SIDE];
    uint32_t match[FORMS][MATCH_COUNTS];
    uint32_t tiny;
    float largest, smallest;
    int64_t zero, negative_zero;
};

// Count the values of eight units BY times, each in its own bins.
template <int BY>
static inline void count_raw(Counts *counts, const float *at) {
    uint64_t pair[LANES / 2];
    at = again(at);
    for (int half = 0; half < LANES / 2; half++) memcpy(pair + half, at + 2 * half, sizeof *pair);
    for (int half = 0; half < LANES / 2; half++) {
        counts[2 * half].raw[(uint32_t)pair[half] >> RAW_SHIFT] += BY;
        counts[2 * half + 1].raw[pair[half] >> (32 + RAW_SHIFT)] += BY;
    }
}

// Look for zeros among what was counted of a block with the smallest magnitudes; how many there are.
static int64_t count_zeros(Counts *counts, const float *z, int64_t step, int64_t n) {
    uint32_t tiny = counts->raw[0] + counts->raw[RAW_SIDE];
    if (tiny == counts->tiny) return 0;
    counts->tiny = tiny;
    int64_t zero = 0;
    for (int64_t p = 0; p < n; p++) {
        zero += z[step * p] == 0;
        counts->negative_zero += bits_of(z[step * p]) == 0x80000000u;
    }
    counts->zero += zero;
    return zero;
}

// Move a unit's window up: what falls out below joins the small ones.
static void raise(int32_t *bin, int64_t rise) {
    for (int64_t k = 1; k <= KEPT; k++) {
        int64_t place = k > rise ? k - rise : 0;
        int32_t above = bin[ZERO + 1 + k], below = bin[KEPT - k];
        bin[ZERO + 1 + k] = bin[KEPT - k] = 0;
        bin[ZERO + 1 + place] += above;
        bin[KEPT - place] += below;
    }
}

// Whether all of eight counts are 0.
static inline bool are_zero(const uint32_t *counts) {
    uint64_t pair[LANES / 2];
    memcpy(pair, counts, sizeof pair);
    return ((pair[0] | pair[1]) | (pair[2] | pair[3])) == 0;
}

// Add some counts to bins that rise, or fall, from the first.
template <int STEP>
static inline void add_counts(const uint32_t *count, int32_t *bin, int64_t n) {
    if (n == LANES)
        for (int i = 0; i < LANES; i++) bin[STEP * i] += count[i];
    else
        for (int64_t i = 0; i < n; i++) bin[STEP * i] += count[i];
}

// Add n raw counts of either sign to bins whose places begin at `place`; those below the window are its small ones.
static inline void add_group(const uint32_t *above, const uint32_t *below, int64_t place, int64_t n, int32_t *bin) {
    for (; n > 0 && place < 0; n--, place++, above++, below++) bin[ZERO + 1] += *above, bin[KEPT] += *below;
    add_counts<1>(above, bin + ZERO + 1 + place, n);
    add_counts<-1>(below, bin + KEPT - place, n);
}

// Add the raw counts to a unit's bins, if there are some, and clear them; returns how many positive ones there were.
static int64_t fold(Counts *counts, int64_t *top, int32_t *bin) {
    int64_t last = bits_of(counts->largest) >> RAW_SHIFT, positive = 0;
    if (bin && last + RAW_LEAST > *top) {
        raise(bin, last + RAW_LEAST - *top);
        *top = last + RAW_LEAST;
    }
    // a place in the window is a lattice number less the number below the window
    int64_t bottom = bin ? *top - KEPT - RAW_LEAST : 0;
    for (int64_t group = bits_of(counts->smallest) >> RAW_SHIFT & -LANES; group <= last; group += LANES) {
        uint32_t *above = counts->raw + group, *below = above + RAW_SIDE;
        // most bins are empty: they and what has been counted before stay out of the nearest cache
        if (are_zero(above) && are_zero(below)) continue;
        for (int i = 0; i < LANES; i++) positive += above[i];
        if (bin) add_group(above, below, group - bottom, group + LANES > last ? last + 1 - group : LANES, bin);
        memset(above, 0, LANES * sizeof *above);
        memset(below, 0, LANES * sizeof *below);
    }
    // zeros were counted with the smallest magnitudes
    int64_t zero = counts->zero - counts->negative_zero, small = bottom > 0 ? 0 : -bottom;
    if (bin) {
        bin[ZERO + 1 + small] -= zero;
        bin[KEPT - small] -= counts->negative_zero;
        bin[ZERO] += counts->zero;
    }
    counts->tiny = 0, counts->largest = 0, counts->smallest = __builtin_inff(), counts->zero = counts->negative_zero = 0;
    return positive - zero;
}
