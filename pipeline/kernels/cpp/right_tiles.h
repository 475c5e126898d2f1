// The right side of a template's products in tiles: x, and the sums over it. See tiled.h.

#pragma once

#include "left_tiles.h"

// x of a slice; steps count numbers: entry, pixel, channel.
struct RightTiles {
    const float *x;
    int64_t entries, pixels, channels, places, step[3];
    const int64_t *place_P;  // where a pixel lies in its image with the padding around it
    const uint8_t *pad_A;    // by place, whether it is padding
    float *about_C;          // where the mean goes, which is subtracted; or 0
    char *rest;              // (block, place, 16 channels, piece)
    double *sum_AC, *square_A;
};

// Which places each tap of a window meets: `place_S` at every position, `place_K` further.
struct TileTaps {
    const int64_t *place_S, *place_K;
    int64_t positions, taps, channels;
    const double *sum_AC, *square_A;
    double *sum_KC, *square;  // Σx of each input, and Σx² of all
};

#ifdef MATRIX_UNIT

// Sixteen inputs of two entries as a row of their tiles.
static inline void put_pair(char *tile, __m512 one, __m512 other) {
    Triple low = broken(one), high = broken(other);
    for (int piece = 0; piece < PIECES; piece++)
        _mm512_store_si512(tile + piece * TILE_BYTES,
                           _mm512_or_si512(_mm512_srli_epi32(low.piece[piece], 16), high.piece[piece]));
}

static inline void add_pair(__m512 *sum, __m512 *square, __m512 one, __m512 other) {
    *sum = _mm512_add_ps(*sum, _mm512_add_ps(one, other));
    *square = _mm512_add_ps(*square, _mm512_add_ps(_mm512_mul_ps(one, one), _mm512_mul_ps(other, other)));
}

// Sixteen channels of sixteen pixels of 32 entries, pixels side by side.
static inline void lay_pixels(const RightTiles &right, int64_t block, int64_t p, int64_t c) {
    int64_t entry = block * DEEP, n = right.pixels - p < SIDE ? right.pixels - p : SIDE;
    int64_t channels = right.channels - c < SIDE ? right.channels - c : SIDE;
    int64_t step = step_bytes(right.channels, PIECES);
    const float *x = right.x + entry * right.step[0] + p + c * right.step[2];
    char *to = right.rest + block * right.places * step + c / SIDE * PIECES * TILE_BYTES;
    __m512 sum[SIDE], square[SIDE];
    for (int i = 0; i < SIDE; i++) sum[i] = square[i] = _mm512_setzero_ps();
    for (int64_t e = 0; e < DEEP; e += 2) {
        __m512 row[2][SIDE];
        for (int half = 0; half < 2; half++)
            for (int64_t i = 0; i < SIDE; i++) {
                bool is = entry + e + half < right.entries && i < channels;
                const float *from = x + (e + half) * right.step[0] + i * right.step[2];
                row[half][i] = is ? _mm512_maskz_loadu_ps(first(n), from) : _mm512_setzero_ps();
            }
        transpose(row[0]), transpose(row[1]);
        for (int64_t i = 0; i < n; i++) {
            put_pair(to + right.place_P[p + i] * step + e * 32, row[0][i], row[1][i]);
            add_pair(sum + i, square + i, row[0][i], row[1][i]);
        }
    }
    for (int64_t i = 0; i < n; i++) {
        int64_t place = right.place_P[p + i];
        widen_each(right.sum_AC + place * right.channels + c, sum[i], channels);
        double squares[8] = {};
        widen_into(squares, square[i]);
        right.square_A[place] += total(load<d8>(squares));
    }
}

// Sixteen inputs, which lie side by side, of one pixel of 32 entries.
static inline void lay_inputs(const RightTiles &right, int64_t block, int64_t p, int64_t c) {
    int64_t entry = block * DEEP, channels = right.channels - c < SIDE ? right.channels - c : SIDE;
    int64_t step = step_bytes(right.channels, PIECES), place = right.place_P[p];
    const float *x = right.x + entry * right.step[0] + p * right.step[1] + c;
    char *to = right.rest + (block * right.places + place) * step + c / SIDE * PIECES * TILE_BYTES;
    __mmask16 here = first(channels);
    __m512 sum = _mm512_setzero_ps(), square = sum;
    __m512 about = right.about_C ? _mm512_maskz_loadu_ps(here, right.about_C + c) : sum;
    for (int64_t e = 0; e < DEEP; e += 2) {
        __m512 v[2];
        for (int half = 0; half < 2; half++) {
            const float *from = x + (e + half) * right.step[0];
            bool is = entry + e + half < right.entries;
            v[half] = is ? _mm512_maskz_sub_ps(here, _mm512_maskz_loadu_ps(here, from), about) : _mm512_setzero_ps();
        }
        put_pair(to + e * 32, v[0], v[1]);
        add_pair(&sum, &square, v[0], v[1]);
    }
    widen_each(right.sum_AC + place * right.channels + c, sum, channels);
    double squares[8] = {};
    widen_into(squares, square);
    right.square_A[place] += total(load<d8>(squares));
}

// The mean of every input, which lie side by side.
static bool find_means(const RightTiles &right) {
    int64_t n = pairs(right.channels) * DEEP;
    double *sum_C8 = (double *)calloc(8 * n, sizeof(double));
    int64_t *ignored = (int64_t *)calloc(n, sizeof(int64_t));
    bool found = sum_C8 && ignored;
    LeftTiles as_units = {0, right.x, right.entries, right.pixels, right.channels};
    for (int i = 0; i < 3; i++) as_units.a_step[i] = right.step[i];
    if (found) look_across(as_units, sum_C8, ignored);
    for (int64_t c = 0; found && c < right.channels; c++)
        right.about_C[c] = sum_C8[8 * c] / ((double)right.entries * right.pixels);
    free(sum_C8), free(ignored);
    return found;
}

// 0, or −2 where there is no memory.
static int lay_right(const RightTiles &right) {
    if (right.about_C && !find_means(right)) return -2;
    int64_t blocks = (right.entries + DEEP - 1) / DEEP, step = step_bytes(right.channels, PIECES);
    int64_t whole = pairs(right.channels) * 2 * SIDE;
    bool across = right.step[2] == 1 || right.pixels == 1;
    for (int64_t block = 0; block < blocks; block++) {
        for (int64_t place = 0; place < right.places; place++) {
            char *to = right.rest + (block * right.places + place) * step;
            if (right.pad_A[place])
                memset(to, 0, step);
            else
                for (int64_t c = (right.channels + SIDE - 1) / SIDE; c < whole / SIDE; c++)
                    memset(to + c * PIECES * TILE_BYTES, 0, PIECES * TILE_BYTES);
        }
        for (int64_t p = 0; p < right.pixels; p += across ? 1 : SIDE)
            for (int64_t c = 0; c < right.channels; c += SIDE)
                (across ? lay_inputs : lay_pixels)(right, block, p, c);
    }
    return 0;
}

static void add_taps(const TileTaps &taps) {
    int64_t n = taps.channels;
    for (int64_t k = 0; k < taps.taps; k++)
        for (int64_t s = 0; s < taps.positions; s++) {
            int64_t place = taps.place_S[s] + taps.place_K[k];
            const double *from = taps.sum_AC + place * n;
            double *to = taps.sum_KC + k * n;
            for (int64_t c = 0; c < n; c++) to[c] += from[c];
            *taps.square += taps.square_A[place];
        }
}

#else

static int lay_right(const RightTiles &) { return -2; }
static void add_taps(const TileTaps &) {}

#endif
