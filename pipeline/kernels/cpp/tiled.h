// A template's products on the matrix unit of some processors (AMX): float32 numbers as three of bfloat16 each.
//
// A float32 has 24 bits: rounded to bfloat16 (8 bits), what is left rounded again, and what is left then is one exactly.
// Of the nine products of two such sums six are taken; the other three are below 2^-25 of the whole. The unit multiplies
// 16 × 32 by 32 × 16 numbers at once, sums of 32 in float32, and is 16 times as fast as products of float32 are.
//
// Operands lie in tiles of 1 KiB for that. The 32 numbers of a sum are those of 32 entries at one position, so that a
// window's tap is another tile, whatever its stride, and nothing is copied for it.

#pragma once

#include "vectors.h"

// Presentations of a slice in blocks of 32 entries; steps count numbers: entry, position, unit.
struct LeftTiles {
    const float *z, *a;  // z: 0 where it is a, and firing is not asked for
    int64_t entries, positions, units;
    int64_t z_step[3], a_step[3];
    char *rest, *fired;  // (block, position, 16 units, piece), and the same of firing in one piece; fired may be 0
    float *about_U;
    double *rest_U, *square_U, *fired_U, *rate_U;
};

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

// What is multiplied: rows of a matrix (unit, tap, channel).
struct TileProducts {
    const char *left, *right;
    int64_t pieces, steps, units, channels, taps;  // pieces of the left side, steps of 32 presentations
    const int64_t *place_T, *place_K;              // of each step, and how much further each tap
    float *product_UKC;
};

#if defined(__AVX512BW__) && defined(__x86_64__) && defined(__linux__) && (defined(__clang__) || __GNUC__ >= 11)

#include <cpuid.h>
#include <unistd.h>
#include <sys/syscall.h>

#define AMX __attribute__((target("amx-tile,amx-bf16")))

static const int64_t TILE_BYTES = 1024, PIECES = 3, SIDE = 16, DEEP = 32;
// steps of 32 presentations that are summed in the unit before they are added to memory: more of windows, whose taps are
// many numbers of the product for each that is read
static const int64_t LONG = 16, LONG_OF_WINDOWS = 32;
// bytes of the left side that stay in the second cache while the right side passes
static const int64_t NEAR = 384 << 10;

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

// What a line of `n` numbers adds to Σa (eight doubles) and to how often z > 0; 0 or NaN for what is not finite.
static inline __m512 look_along(const float *z, const float *a, int64_t n, double *sum, int64_t *fired, __m512 spoilt) {
    __m512d sums[2] = {_mm512_loadu_pd(sum), _mm512_setzero_pd()};
    for (int64_t i = 0; i < n; i += SIDE) {
        __mmask16 here = first(n - i);
        __m512 v = _mm512_maskz_loadu_ps(here, a + i), given = z == a ? v : _mm512_maskz_loadu_ps(here, z + i);
        sums[0] = _mm512_add_pd(sums[0], _mm512_cvtps_pd(_mm512_castps512_ps256(v)));
        sums[1] = _mm512_add_pd(sums[1], _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1)));
        *fired += __builtin_popcount(_mm512_cmp_ps_mask(given, _mm512_setzero_ps(), _CMP_GT_OQ));
        spoilt = _mm512_add_ps(spoilt, _mm512_sub_ps(given, given));
    }
    _mm512_storeu_pd(sum, _mm512_add_pd(sums[0], sums[1]));
    return spoilt;
}

// Σa, and how often z > 0, of every unit, whose positions lie side by side; `sum_U8` begins at 0. Whether z is finite.
static bool look_at_lines(const LeftTiles &left, double *sum_U8, int64_t *fired_U) {
    __m512 spoilt = _mm512_setzero_ps();
    for (int64_t l = 0; l < left.entries; l++)
        for (int64_t u = 0; u < left.units; u++) {
            const float *a = left.a + l * left.a_step[0] + u * left.a_step[2];
            const float *z = left.z ? left.z + l * left.z_step[0] + u * left.z_step[2] : a;
            spoilt = look_along(z, a, left.positions, sum_U8 + 8 * u, fired_U + u, spoilt);
        }
    return _mm512_cmp_ps_mask(spoilt, _mm512_setzero_ps(), _CMP_NEQ_UQ) == 0;
}

// The same where units lie side by side: sums of doubles in `sum_U8`, of which the first is that of the unit.
static bool look_across(const LeftTiles &left, double *sum_U8, int64_t *fired_U) {
    __m512 spoilt = _mm512_setzero_ps();
    const int BLOCKS = 4;
    for (int64_t u = 0; u < left.units; u += BLOCKS * SIDE) {
        __m512d sums[2 * BLOCKS];
        __m512i fired[BLOCKS];
        for (int b = 0; b < BLOCKS; b++)
            sums[2 * b] = sums[2 * b + 1] = _mm512_setzero_pd(), fired[b] = _mm512_setzero_si512();
        for (int64_t l = 0; l < left.entries; l++)
            for (int64_t s = 0; s < left.positions; s++) {
                const float *a = left.a + l * left.a_step[0] + s * left.a_step[1] + u;
                const float *z = left.z ? left.z + l * left.z_step[0] + s * left.z_step[1] + u : a;
                for (int b = 0; b < BLOCKS; b++) {
                    __mmask16 here = first(left.units - u - b * SIDE);
                    __m512 v = _mm512_maskz_loadu_ps(here, a + b * SIDE);
                    __m512 given = z == a ? v : _mm512_maskz_loadu_ps(here, z + b * SIDE);
                    sums[2 * b] = _mm512_add_pd(sums[2 * b], _mm512_cvtps_pd(_mm512_castps512_ps256(v)));
                    sums[2 * b + 1] = _mm512_add_pd(sums[2 * b + 1], _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1)));
                    __mmask16 fires = _mm512_cmp_ps_mask(given, _mm512_setzero_ps(), _CMP_GT_OQ);
                    fired[b] = _mm512_mask_add_epi32(fired[b], fires, fired[b], _mm512_set1_epi32(1));
                    spoilt = _mm512_add_ps(spoilt, _mm512_sub_ps(given, given));
                }
            }
        for (int b = 0; b < BLOCKS; b++) {
            double sum[SIDE];
            int32_t count[SIDE];
            _mm512_storeu_pd(sum, sums[2 * b]), _mm512_storeu_pd(sum + 8, sums[2 * b + 1]);
            _mm512_storeu_si512(count, fired[b]);
            for (int64_t i = 0, at = u + b * SIDE; i < SIDE && at < left.units; i++, at++)
                sum_U8[8 * at] = sum[i], fired_U[at] = count[i];
        }
    }
    return _mm512_cmp_ps_mask(spoilt, _mm512_setzero_ps(), _CMP_NEQ_UQ) == 0;
}

// 32 numbers of one unit as a row of its tiles.
static inline void put_row(char *tile, __m512 low, __m512 high) {
    const __m512i odd = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27, 25, 23,
                                         21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    Triple one = broken(low), other = broken(high);
    for (int piece = 0; piece < PIECES; piece++)
        _mm512_store_si512(tile + piece * TILE_BYTES, _mm512_permutex2var_epi16(one.piece[piece], odd, other.piece[piece]));
}

static inline void put_fired(char *tile, uint32_t mask, uint16_t yes, uint16_t no, uint32_t kept) {
    __m512i v = _mm512_mask_blend_epi16(mask, _mm512_set1_epi16(no), _mm512_set1_epi16(yes));
    _mm512_store_si512(tile, _mm512_maskz_mov_epi16(kept, v));
}

// what is added to a sum of squares, so that it is not 0 where squares vanish and what they are of does not
static const double LEAST = 0x1p-1000;

// A row of sixteen: its deviations, what they and their squares add up to.
struct Deviation {
    __m512 about, rest, square;
    __mmask16 left;
    inline __m512 of(__mmask16 here, const float *a) {
        __m512 v = _mm512_maskz_sub_ps(here, _mm512_maskz_loadu_ps(here, a), about);
        rest = _mm512_add_ps(rest, v), square = _mm512_add_ps(square, _mm512_mul_ps(v, v));
        left |= _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_NEQ_UQ);
        return v;
    }
};

static inline uint16_t bf16(double v) { return (uint16_t)(bits_of((float)v) >> 16); }

// One unit, sixteen positions beside each other, 32 entries.
static inline void lay_line(const LeftTiles &left, int64_t block, int64_t s, int64_t u, const float *about, double *rest_8,
                            double *square_8) {
    int64_t entry = block * DEEP, entries = left.entries - entry < DEEP ? left.entries - entry : DEEP;
    int64_t n = left.positions - s < SIDE ? left.positions - s : SIDE;
    int64_t step = step_bytes(left.units, PIECES), fired_step = step_bytes(left.units, 1);
    const float *a = left.a + entry * left.a_step[0] + s + u * left.a_step[2];
    const float *z = left.z ? left.z + entry * left.z_step[0] + s + u * left.z_step[2] : a;
    __mmask16 here = first(n);
    Deviation unit = {_mm512_set1_ps(*about), _mm512_setzero_ps(), _mm512_setzero_ps(), 0};
    __m512 row[2][SIDE];
    uint32_t fires[SIDE] = {};
    for (int64_t e = 0; e < DEEP; e++) {
        row[e / SIDE][e % SIDE] = e < entries ? unit.of(here, a + e * left.a_step[0]) : _mm512_setzero_ps();
        if (e < entries) _mm_prefetch((const char *)(a + e * left.a_step[0] + SIDE), _MM_HINT_T0);
    }
    widen_into(rest_8, unit.rest), widen_into(square_8, unit.square);
    if (unit.left) square_8[0] += LEAST;
    transpose(row[0]), transpose(row[1]);
    int64_t at = block * left.positions + s;
    char *tile = left.rest + at * step + u / SIDE * PIECES * TILE_BYTES + u % SIDE * 64;
    for (int64_t p = 0; p < n; p++, tile += step) put_row(tile, row[0][p], row[1][p]);
    if (!left.fired) return;
    // masks of the entries at each position are the transpose of those of the positions of each entry
    __m512i bits = _mm512_setzero_si512();
    for (int64_t e = 0; e < entries; e++) {
        __mmask16 fired = _mm512_cmp_ps_mask(_mm512_maskz_loadu_ps(here, z + e * left.z_step[0]), _mm512_setzero_ps(), _CMP_GT_OQ);
        bits = _mm512_mask_or_epi32(bits, fired, bits, _mm512_set1_epi32((int)(1u << e)));
    }
    _mm512_storeu_si512(fires, bits);
    uint16_t yes = bf16(1 - left.rate_U[u]), no = bf16(-left.rate_U[u]);
    uint32_t kept = entries == DEEP ? ~0u : (1u << entries) - 1;
    tile = left.fired + at * fired_step + u / SIDE * TILE_BYTES + u % SIDE * 64;
    for (int64_t p = 0; p < n; p++, tile += fired_step) put_fired(tile, fires[p], yes, no, kept);
}

// Sixteen units beside each other, at one position of 32 entries.
static inline void lay_units(const LeftTiles &left, int64_t block, int64_t s, int64_t u, double *rest_16, double *square_16) {
    int64_t entry = block * DEEP, entries = left.entries - entry < DEEP ? left.entries - entry : DEEP;
    const float *a = left.a + entry * left.a_step[0] + s * left.a_step[1] + u;
    const float *z = left.z ? left.z + entry * left.z_step[0] + s * left.z_step[1] + u : a;
    int64_t n = left.units - u < SIDE ? left.units - u : SIDE;
    __mmask16 here = first(n);
    Deviation units = {_mm512_maskz_loadu_ps(here, left.about_U + u), _mm512_setzero_ps(), _mm512_setzero_ps(), 0};
    __m512 row[2][SIDE];
    for (int64_t e = 0; e < DEEP; e++)
        row[e / SIDE][e % SIDE] = e < entries ? units.of(here, a + e * left.a_step[0]) : _mm512_setzero_ps();
    widen_each(rest_16, units.rest, n), widen_each(square_16, units.square, n);
    for (int64_t i = 0; i < n; i++) square_16[i] += units.left >> i & 1 ? LEAST : 0;
    transpose(row[0]), transpose(row[1]);
    int64_t at = block * left.positions + s;
    char *tile = left.rest + at * step_bytes(left.units, PIECES) + u / SIDE * PIECES * TILE_BYTES;
    for (int64_t i = 0; i < n; i++) put_row(tile + i * 64, row[0][i], row[1][i]);
    if (!left.fired) return;
    __m512i bits = _mm512_setzero_si512();
    for (int64_t e = 0; e < entries; e++) {
        __mmask16 fired = _mm512_cmp_ps_mask(_mm512_maskz_loadu_ps(here, z + e * left.z_step[0]), _mm512_setzero_ps(), _CMP_GT_OQ);
        bits = _mm512_mask_or_epi32(bits, fired, bits, _mm512_set1_epi32((int)(1u << e)));
    }
    uint32_t fires[SIDE], kept = entries == DEEP ? ~0u : (1u << entries) - 1;
    _mm512_storeu_si512(fires, bits);
    tile = left.fired + at * step_bytes(left.units, 1) + u / SIDE * TILE_BYTES;
    for (int64_t i = 0; i < n; i++)
        put_fired(tile + i * 64, fires[i], bf16(1 - left.rate_U[u + i]), bf16(-left.rate_U[u + i]), kept);
}

// Rows of tiles beyond the last unit, which are multiplied too.
static void clear_rest(const LeftTiles &left, int64_t at) {
    int64_t blocks = 2 * pairs(left.units), step = step_bytes(left.units, PIECES), fired_step = step_bytes(left.units, 1);
    for (int64_t u = left.units; u < blocks * SIDE; u++) {
        for (int piece = 0; piece < PIECES; piece++)
            memset(left.rest + at * step + (u / SIDE * PIECES + piece) * TILE_BYTES + u % SIDE * 64, 0, 64);
        if (left.fired) memset(left.fired + at * fired_step + u / SIDE * TILE_BYTES + u % SIDE * 64, 0, 64);
    }
}

// 0; −1 where z is not finite, −2 where there is no memory.
static int lay_left(const LeftTiles &left) {
    int64_t units = 2 * DEEP * pairs(left.units), blocks = (left.entries + DEEP - 1) / DEEP;
    bool across = left.a_step[2] == 1 && (!left.z || left.z_step[2] == 1) && left.units > 1;
    double *memory = (double *)calloc(24 * units, sizeof(double));
    int64_t *fired_U = (int64_t *)calloc(units, sizeof(int64_t));
    if (!memory || !fired_U) return free(memory), free(fired_U), -2;
    double *sum_U8 = memory, *rest_U8 = memory + 8 * units, *square_U8 = rest_U8 + 8 * units;
    bool sound = across ? look_across(left, sum_U8, fired_U) : look_at_lines(left, sum_U8, fired_U);
    double n = (double)left.entries * left.positions;
    for (int64_t u = 0; u < left.units; u++) {
        left.about_U[u] = total(load<d8>(sum_U8 + 8 * u)) / n;
        left.fired_U[u] = fired_U[u];
        // in 256ths, so that it and 1 less it are numbers of bfloat16
        left.rate_U[u] = __builtin_rint(256 * (fired_U[u] / n)) / 256;
    }
    for (int64_t block = 0; sound && block < blocks; block++)
        for (int64_t s = 0; s < left.positions; s += across ? 1 : SIDE) {
            for (int64_t u = 0; u < left.units; u += across ? SIDE : 1)
                if (across)
                    lay_units(left, block, s, u, rest_U8 + u, square_U8 + u);
                else
                    lay_line(left, block, s, u, left.about_U + u, rest_U8 + 8 * u, square_U8 + 8 * u);
            for (int64_t p = s; p < left.positions && p < s + (across ? 1 : SIDE); p++)
                clear_rest(left, block * left.positions + p);
        }
    for (int64_t u = 0; u < left.units; u++) {
        left.rest_U[u] = across ? rest_U8[u] : total(load<d8>(rest_U8 + 8 * u));
        left.square_U[u] = across ? square_U8[u] : total(load<d8>(square_U8 + 8 * u));
    }
    free(memory), free(fired_U);
    return sound ? 0 : -1;
}

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

struct TileShapes {
    uint8_t palette, start, unused[14];
    uint16_t bytes[16];
    uint8_t rows[16];
};

#define FOUR_PRODUCTS \
    { _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7); _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7); }
#define LOAD_LEFT(piece) \
    { _tile_loadd(4, left + (piece) * TILE_BYTES, 64); _tile_loadd(5, left + (LEFT + (piece)) * TILE_BYTES, 64); }
#define LOAD_RIGHT(piece) \
    { _tile_loadd(6, right + (piece) * TILE_BYTES, 64); _tile_loadd(7, right + (PIECES + (piece)) * TILE_BYTES, 64); }

// One step: 32 units by 32 inputs, the small products first.
template <int LEFT>
AMX static inline void multiply_step(const char *left, const char *right) {
    if (LEFT == PIECES) {
        LOAD_LEFT(LEFT - 1) LOAD_RIGHT(0) FOUR_PRODUCTS
        LOAD_LEFT(LEFT > 1 ? 1 : 0) FOUR_PRODUCTS
        LOAD_RIGHT(1) FOUR_PRODUCTS
        LOAD_LEFT(0) FOUR_PRODUCTS
        LOAD_RIGHT(2) FOUR_PRODUCTS
        LOAD_RIGHT(0) FOUR_PRODUCTS
    } else {
        LOAD_LEFT(0) LOAD_RIGHT(2) FOUR_PRODUCTS
        LOAD_RIGHT(1) FOUR_PRODUCTS
        LOAD_RIGHT(0) FOUR_PRODUCTS
    }
}

// Add what is in the unit to rows of the product.
AMX static void add_tiles(float *to, int64_t row, int64_t units, int64_t channels, float *scratch) {
    _tile_stored(0, scratch, 64);
    _tile_stored(1, scratch + 256, 64);
    _tile_stored(2, scratch + 512, 64);
    _tile_stored(3, scratch + 768, 64);
    __mmask16 low = first(channels), high = first(channels - SIDE);
    for (int64_t u = 0; u < units; u++, to += row) {
        const float *from = scratch + u / SIDE * 512 + u % SIDE * SIDE;
        _mm512_mask_storeu_ps(to, low, _mm512_add_ps(_mm512_maskz_loadu_ps(low, to), _mm512_load_ps(from)));
        if (high)
            _mm512_mask_storeu_ps(to + SIDE, high, _mm512_add_ps(_mm512_maskz_loadu_ps(high, to + SIDE), _mm512_load_ps(from + 256)));
    }
}

// Ask for rows of the product while the unit is busy.
static inline void ask(const float *to, int64_t row, int64_t units) {
    for (int64_t u = 0; u < units; u++, to += row)
        __builtin_prefetch(to, 1), __builtin_prefetch(to + SIDE, 1), __builtin_prefetch(to + DEEP - 1, 1);
}

// Units first … last by the inputs c …, at steps begin … end, for all taps.
template <int LEFT>
AMX static void multiply_block(const TileProducts &all_, int64_t begin, int64_t end, int64_t first_, int64_t last, int64_t c) {
    alignas(64) float scratch[4 * 256];
    int64_t left_step = step_bytes(all_.units, LEFT), right_step = step_bytes(all_.channels, PIECES);
    int64_t row = all_.taps * all_.channels;
    for (int64_t tap = 0; tap < all_.taps; tap++)
        for (int64_t u = first_; u < last; u += DEEP) {
            int64_t units = all_.units - u < DEEP ? all_.units - u : DEEP;
            float *to = all_.product_UKC + u * row + tap * all_.channels + c;
            ask(to, row, units);
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            const char *left = all_.left + u / SIDE * LEFT * TILE_BYTES;
            const char *right = all_.right + c / SIDE * PIECES * TILE_BYTES + all_.place_K[tap] * right_step;
            for (int64_t t = begin; t < end; t++)
                multiply_step<LEFT>(left + t * left_step, right + all_.place_T[t] * right_step);
            add_tiles(to, row, units, all_.channels - c, scratch);
        }
}

template <int LEFT>
AMX static void multiply_tiles(const TileProducts &all_) {
    TileShapes shapes = {1};
    for (int tile = 0; tile < 8; tile++) shapes.bytes[tile] = 64, shapes.rows[tile] = SIDE;
    _tile_loadconfig(&shapes);
    const int64_t longest = all_.taps > 1 ? LONG_OF_WINDOWS : LONG;
    const int64_t block = NEAR / (longest * 2 * LEFT * TILE_BYTES) * DEEP;
    for (int64_t begin = 0; begin < all_.steps; begin += longest) {
        int64_t end = begin + longest < all_.steps ? begin + longest : all_.steps;
        for (int64_t u = 0; u < all_.units; u += block)
            for (int64_t c = 0; c < all_.channels; c += DEEP)
                multiply_block<LEFT>(all_, begin, end, u, u + block < all_.units ? u + block : all_.units, c);
    }
    _tile_release();
}

// Whether the processor has the unit and the system lets this process use it.
static bool has_tiles() {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return false;
    const int ASK = 0x1023, TILE_DATA = 18;
    return syscall(SYS_arch_prctl, ASK, TILE_DATA) == 0;
}

#else

static int lay_left(const LeftTiles &) { return -2; }
static int lay_right(const RightTiles &) { return -2; }
static void add_taps(const TileTaps &) {}
template <int LEFT>
static void multiply_tiles(const TileProducts &) {}
static bool has_tiles() { return false; }
static inline int64_t step_bytes(int64_t, int64_t) { return 0; }

#endif
