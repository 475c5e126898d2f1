// Vectors of fixed width, so that a sum has the same terms in the same order on every processor.
//
// They are the compilers' own (GCC, Clang), not one machine's: where the machine's are narrower, several are used.
// Floating-point contraction is off (see native_build.py): every operation rounds as IEEE 754 and torch do.

#pragma once

#include <stdint.h>
#include <string.h>

typedef float f8 __attribute__((vector_size(32)));
typedef int32_t w8 __attribute__((vector_size(32)));
typedef double d4 __attribute__((vector_size(32)));
typedef int64_t l4 __attribute__((vector_size(32)));
typedef float f4 __attribute__((vector_size(16)));

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, w8{__VA_ARGS__})
#endif

template <class Vector, class Number>
static inline Vector load(const Number *from) {
    Vector vector;
    memcpy(&vector, from, sizeof vector);
    return vector;
}

template <class Vector, class Number>
static inline void store(Number *to, Vector vector) {
    memcpy(to, &vector, sizeof vector);
}

static inline d4 widened(const float *from) { return __builtin_convertvector(load<f4>(from), d4); }

static inline double sum(d4 v) { return (v[0] + v[2]) + (v[1] + v[3]); }

template <class Vector>
static inline Vector larger(Vector a, Vector b) { return a > b ? a : b; }

template <class Vector>
static inline Vector smaller(Vector a, Vector b) { return a < b ? a : b; }

static inline double absolute(double v) { return v < 0 ? -v : v; }

static inline d4 absolute(d4 v) { return (d4)((l4)v & INT64_MAX); }

static inline bool is_finite(double v) { return v - v == 0; }

static inline int64_t bits_of(double v) {
    int64_t bits;
    memcpy(&bits, &v, sizeof bits);
    return bits;
}

static inline uint32_t bits_of(float v) {
    uint32_t bits;
    memcpy(&bits, &v, sizeof bits);
    return bits;
}

static inline float float_of(uint32_t bits) {
    float v;
    memcpy(&v, &bits, sizeof v);
    return v;
}

// Numbers narrower than float32, widened exactly.
struct BFloat16 {
    uint16_t bits;
    operator float() const { return float_of((uint32_t)bits << 16); }
};

struct Float16 {
    uint16_t bits;
    operator float() const {
        uint32_t sign = (uint32_t)(bits & 0x8000) << 16, rest = bits & 0x7FFF;
        if (rest >= 0x7C00) return float_of(sign | 0x7F800000 | rest << 13);
        // the exponents' bias differs by 112; below the normal numbers the product is exact all the same
        return float_of(sign | bits_of(float_of(rest << 13) * 0x1p112f));
    }
};

// Turn eight rows of eight into eight columns.
static inline void transpose(f8 r[8]) {
    f8 a[8], b[8];
    for (int i = 0; i < 8; i += 2) {
        a[i] = SHUFFLE(r[i], r[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        a[i + 1] = SHUFFLE(r[i], r[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            b[i + 2 * j] = SHUFFLE(a[i + j], a[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
            b[i + 2 * j + 1] = SHUFFLE(a[i + j], a[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        }
    for (int i = 0; i < 4; i++) {
        r[i] = SHUFFLE(b[i], b[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        r[i + 4] = SHUFFLE(b[i], b[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
}
