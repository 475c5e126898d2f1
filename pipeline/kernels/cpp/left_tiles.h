// The left side of a template's products in tiles: a less its mean, and whether it fired, less how often. See tiled.h.

#pragma once

#include "pieces.h"
#include "sums.h"

// Presentations of a slice in blocks of 32 entries; steps count numbers: entry, position, unit.
struct LeftTiles {
    const float *z, *a;  // z: 0 where it is a, and firing is not asked for
    int64_t entries, positions, units;
    int64_t z_step[3], a_step[3];
    char *rest, *fired;  // (block, position, 16 units, piece), and the same of firing in one piece; fired may be 0
    float *about_U;
    double *rest_U, *square_U, *fired_U, *rate_U;
};

#ifdef MATRIX_UNIT

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

#else

static int lay_left(const LeftTiles &) { return -2; }

#endif
