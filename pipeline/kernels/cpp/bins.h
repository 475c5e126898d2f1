// The histogram of z, as kernels/bins.py defines it.
//
// A run is counted in raw bins, the first bits of a float32: sign, exponent, BIN_BITS of the mantissa. Once per batch the raw
// bins of a unit are folded into the window that ends at its largest magnitude.

#pragma once

#include "vectors.h"

// KEPT and BIN_BITS are kernels/bins.py's KEPT and MANTISSA_BITS
static const int ZERO = KEPT + 1, BINS = 2 * (KEPT + 1) + 1;
static const int RAW_SIDE = 1 << (8 + BIN_BITS), RAW_SHIFT = 23 - BIN_BITS;
// lattice number of the raw bin 0
static const int RAW_LEAST = -(127 << BIN_BITS);

// One unit's raw counts, and between which magnitudes and with how many zeros they lie.
struct Raw {
    uint32_t count[2 * RAW_SIDE];
    int64_t first, last, zero, negative_zero;
};

static void count_raw(Raw *raw, const float *z, int64_t n) {
    int64_t p = 0;
    for (; p + 4 <= n; p += 4) {
        uint64_t pair[2];
        memcpy(pair, z + p, sizeof pair);
        raw->count[(uint32_t)pair[0] >> RAW_SHIFT]++;
        raw->count[pair[0] >> (32 + RAW_SHIFT)]++;
        raw->count[(uint32_t)pair[1] >> RAW_SHIFT]++;
        raw->count[pair[1] >> (32 + RAW_SHIFT)]++;
    }
    for (; p < n; p++) raw->count[bits_of(z[p]) >> RAW_SHIFT]++;
}

// Widen the range of what was counted by a run between the magnitudes `least` and `largest`.
static void widen(Raw *raw, float least, float largest, int64_t zero, const float *z, int64_t n) {
    int64_t first = zero ? 0 : bits_of(least) >> RAW_SHIFT, last = bits_of(largest) >> RAW_SHIFT;
    if (first < raw->first) raw->first = first;
    if (last > raw->last) raw->last = last;
    raw->zero += zero;
    if (zero)
        for (int64_t p = 0; p < n; p++) raw->negative_zero += bits_of(z[p]) == 0x80000000u;
}

// Move a unit's window up: what falls out below joins the small ones.
static void raise(int64_t *bin, int64_t rise) {
    for (int64_t k = 1; k <= KEPT; k++) {
        int64_t place = k > rise ? k - rise : 0, above = bin[ZERO + 1 + k], below = bin[KEPT - k];
        bin[ZERO + 1 + k] = bin[KEPT - k] = 0;
        bin[ZERO + 1 + place] += above;
        bin[KEPT - place] += below;
    }
}

// Add the raw counts to a unit's bins and clear them.
static void fold(Raw *raw, int64_t *top, int64_t *bin) {
    if (raw->last + RAW_LEAST > *top) {
        raise(bin, raw->last + RAW_LEAST - *top);
        *top = raw->last + RAW_LEAST;
    }
    // a place in the window is a lattice number less the number below the window
    int64_t bottom = *top - KEPT - RAW_LEAST, small = bottom > 0 ? 0 : -bottom;
    int64_t first = raw->first, last = raw->last;
    for (; first <= last && first < bottom; first++) {
        bin[ZERO + 1] += raw->count[first];
        bin[KEPT] += raw->count[RAW_SIDE + first];
    }
    for (; first <= last; first++) {
        bin[ZERO + 1 + first - bottom] += raw->count[first];
        bin[KEPT - first + bottom] += raw->count[RAW_SIDE + first];
    }
    // zeros were counted with the smallest magnitudes
    bin[ZERO + 1 + small] -= raw->zero - raw->negative_zero;
    bin[KEPT - small] -= raw->negative_zero;
    bin[ZERO] += raw->zero;
    int64_t cleared = raw->first <= last ? (last - raw->first + 1) * sizeof(uint32_t) : 0;
    memset(raw->count + raw->first, 0, cleared);
    memset(raw->count + RAW_SIDE + raw->first, 0, cleared);
    raw->first = RAW_SIDE - 1, raw->last = 0, raw->zero = raw->negative_zero = 0;
}
