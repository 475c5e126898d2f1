// A template's products on the matrix unit of some processors (AMX): float32 numbers as three of bfloat16 each.
//
// A float32 has 24 bits: rounded to bfloat16 (8 bits), what is left rounded again, and what is left then is one exactly.
// Of the nine products of two such sums six are taken; the other three are below 2^-25 of the whole. The unit multiplies
// 16 × 32 by 32 × 16 numbers at once, sums of 32 in float32, and is 16 times as fast as products of float32 are.
//
// Operands lie in tiles of 1 KiB for that. The 32 numbers of a sum are those of 32 entries at one position, so that a
// window's tap is another tile, whatever its stride, and nothing is copied for it.

#pragma once

#include "right_tiles.h"

// What is multiplied: rows of a matrix (unit, tap, channel).
struct TileProducts {
    const char *left, *right;
    int64_t pieces, steps, units, channels, taps;  // pieces of the left side, steps of 32 presentations
    const int64_t *place_T, *place_K;              // of each step, and how much further each tap
    float *product_UKC;
};

#ifdef MATRIX_UNIT

#include <cpuid.h>

#define AMX __attribute__((target("amx-tile,amx-bf16")))

// steps of 32 presentations that are summed in the unit before they are added to memory: more of windows, whose taps are
// many numbers of the product for each that is read
static const int64_t LONG = 16, LONG_OF_WINDOWS = 32;
// bytes of the left side that stay in the second cache while the right side passes
static const int64_t NEAR = 384 << 10;

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
    const int ARCH_PRCTL = 158, ASK = 0x1023, TILE_DATA = 18;  // of Linux on x86-64
    return syscall(ARCH_PRCTL, ASK, TILE_DATA) == 0;
}

#else

template <int LEFT>
static void multiply_tiles(const TileProducts &) {}
static bool has_tiles() { return false; }
static inline int64_t step_bytes(int64_t, int64_t) { return 0; }

#endif
