// Numbers of float32 as three of bfloat16, and tiles of them: what both sides of `tiled.h` are made with.

#pragma once

#include "vectors.h"

#if defined(__AVX512BW__) && defined(__x86_64__) && defined(__linux__) && (defined(__clang__) || __GNUC__ >= 11)
#define MATRIX_UNIT

static const int64_t TILE_BYTES = 1024, PIECES = 3, SIDE = 16, DEEP = 32;

// Tiles of 16 come in pairs; a line more, so that tiles of neighbouring steps do not meet in the caches.
static inline int64_t pairs(int64_t n) { return (n + DEEP - 1) / DEEP; }
static inline int64_t step_bytes(int64_t n, int64_t pieces) { return pairs(n) * 2 * pieces * TILE_BYTES + 64; }

struct Triple {
    __m512i piece[PIECES];
};

// Halves are rounded away from 0; bfloat16 numbers as float32.
static inline Triple broken(__m512 v) {
    const __m512i half = _mm512_set1_epi32(0x8000), upper = _mm512_set1_epi32((int)0xFFFF0000);
    Triple found;
    for (int piece = 0; piece < PIECES - 1; piece++) {
        found.piece[piece] = _mm512_and_si512(_mm512_add_epi32(_mm512_castps_si512(v), half), upper);
        v = _mm512_sub_ps(v, _mm512_castsi512_ps(found.piece[piece]));
    }
    found.piece[PIECES - 1] = _mm512_castps_si512(v);
    return found;
}

static inline __mmask16 first(int64_t n) { return n >= SIDE ? 0xFFFF : n <= 0 ? 0 : (__mmask16)((1 << n) - 1); }

static inline void transpose(__m512 *row) {
    __m512 t[SIDE];
    for (int i = 0; i < SIDE; i += 2)
        t[i] = _mm512_unpacklo_ps(row[i], row[i + 1]), t[i + 1] = _mm512_unpackhi_ps(row[i], row[i + 1]);
    for (int i = 0; i < SIDE; i += 4)
        for (int j = 0; j < 2; j++) {
            __m512d a = _mm512_castps_pd(t[i + j]), b = _mm512_castps_pd(t[i + j + 2]);
            row[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
            row[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
        }
    for (int i = 0; i < SIDE; i += 8)
        for (int j = 0; j < 4; j++) {
            t[i + j] = _mm512_shuffle_f32x4(row[i + j], row[i + j + 4], 0x88);
            t[i + j + 4] = _mm512_shuffle_f32x4(row[i + j], row[i + j + 4], 0xDD);
        }
    for (int j = 0; j < 8; j++) {
        row[j] = _mm512_shuffle_f32x4(t[j], t[j + 8], 0x88);
        row[j + 8] = _mm512_shuffle_f32x4(t[j], t[j + 8], 0xDD);
    }
}

// A pair of eight doubles and the sums of sixteen numbers in them.
static inline void widen_into(double *sum, __m512 v) {
    __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(v)), high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1));
    _mm512_storeu_pd(sum, _mm512_add_pd(_mm512_loadu_pd(sum), _mm512_add_pd(low, high)));
}
static inline void widen_each(double *sum, __m512 v, int64_t n) {
    __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(v)), high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1));
    _mm512_mask_storeu_pd(sum, (__mmask8)first(n), _mm512_add_pd(_mm512_maskz_loadu_pd((__mmask8)first(n), sum), low));
    __mmask8 rest = (__mmask8)first(n - 8);
    _mm512_mask_storeu_pd(sum + 8, rest, _mm512_add_pd(_mm512_maskz_loadu_pd(rest, sum + 8), high));
}

#endif
