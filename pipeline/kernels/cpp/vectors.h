// Eight units side by side: vectors of fixed width, so that a sum has the same terms in the same order everywhere.
//
// They are the compilers' own (GCC, Clang), not one machine's. Eight doubles are one vector where the machine has such,
// else two: GCC would break a vector that is wider than the machine's down to single numbers.
// Floating-point contraction is off (see compiler.py): every operation rounds as IEEE 754 and torch do.

#pragma once

#include "libc.h"

static const int LANES = 8;

typedef float f8 __attribute__((vector_size(32)));
typedef int32_t w8 __attribute__((vector_size(32)));

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, w8{__VA_ARGS__})
#endif

#ifdef __AVX512F__

typedef double d8 __attribute__((vector_size(64)));
typedef int64_t l8 __attribute__((vector_size(64)));
typedef uint64_t u8 __attribute__((vector_size(64)));

static inline d8 widened(f8 v) { return __builtin_convertvector(v, d8); }
static inline d8 widened(l8 v) { return __builtin_convertvector(v, d8); }
static inline f8 narrowed(d8 v) { return __builtin_convertvector(v, f8); }
// listed, not added to 0: so it is read into all lanes at once
static inline d8 all(double v) { return d8{v, v, v, v, v, v, v, v}; }
static inline l8 all(int64_t v) { return l8{} + v; }
static inline u8 all(uint64_t v) { return u8{} + v; }
static inline l8 bits_of(d8 v) { return (l8)v; }
static inline d8 double_of(l8 v) { return (d8)v; }
static inline l8 as_signed(u8 v) { return (l8)v; }
static inline u8 as_unsigned(l8 v) { return (u8)v; }
static inline d8 select(l8 mask, d8 a, d8 b) { return mask ? a : b; }
static inline l8 select(l8 mask, l8 a, l8 b) { return mask ? a : b; }
// one bit for each lane whose mask is set
static inline int lanes_of(l8 mask) { return _mm512_movepi64_mask((__m512i)mask); }

#else

typedef double d4 __attribute__((vector_size(32)));
typedef int64_t l4 __attribute__((vector_size(32)));
typedef uint64_t u4 __attribute__((vector_size(32)));
typedef float f4 __attribute__((vector_size(16)));

template <class Vector>
struct Pair {
    Vector low, high;
};

typedef Pair<d4> d8;
typedef Pair<l4> l8;
typedef Pair<u4> u8;

#define OPERATOR(symbol)                                                    \
    template <class V>                                                      \
    static inline Pair<V> operator symbol(Pair<V> a, Pair<V> b) {           \
        return {a.low symbol b.low, a.high symbol b.high};                  \
    }
#define SHIFT(symbol)                                                                                               \
    template <class V>                                                                                              \
    static inline Pair<V> operator symbol(Pair<V> a, int by) { return {a.low symbol by, a.high symbol by}; }
#define COMPARISON(symbol)                                                                                          \
    static inline l8 operator symbol(d8 a, d8 b) { return {(l4)(a.low symbol b.low), (l4)(a.high symbol b.high)}; } \
    static inline l8 operator symbol(l8 a, l8 b) { return {(l4)(a.low symbol b.low), (l4)(a.high symbol b.high)}; }
OPERATOR(+) OPERATOR(-) OPERATOR(*) OPERATOR(/) OPERATOR(&) OPERATOR(|) OPERATOR(^)
SHIFT(<<) SHIFT(>>)
COMPARISON(<) COMPARISON(>) COMPARISON(<=) COMPARISON(>=) COMPARISON(==)
#undef OPERATOR
#undef SHIFT
#undef COMPARISON

template <class V>
static inline Pair<V> operator-(Pair<V> v) { return {-v.low, -v.high}; }
template <class V>
static inline Pair<V> &operator+=(Pair<V> &a, Pair<V> b) { return a = a + b; }
template <class V>
static inline Pair<V> &operator-=(Pair<V> &a, Pair<V> b) { return a = a - b; }

static inline d8 widened(f8 v) {
    f4 half[2];
    memcpy(half, &v, sizeof half);
    return {__builtin_convertvector(half[0], d4), __builtin_convertvector(half[1], d4)};
}
static inline d8 widened(l8 v) { return {__builtin_convertvector(v.low, d4), __builtin_convertvector(v.high, d4)}; }
static inline f8 narrowed(d8 v) {
    f4 half[2] = {__builtin_convertvector(v.low, f4), __builtin_convertvector(v.high, f4)};
    f8 both;
    memcpy(&both, half, sizeof both);
    return both;
}
static inline d8 all(double v) { return {d4{v, v, v, v}, d4{v, v, v, v}}; }
static inline l8 all(int64_t v) { return {l4{} + v, l4{} + v}; }
static inline u8 all(uint64_t v) { return {u4{} + v, u4{} + v}; }
static inline l8 bits_of(d8 v) { return {(l4)v.low, (l4)v.high}; }
static inline d8 double_of(l8 v) { return {(d4)v.low, (d4)v.high}; }
static inline l8 as_signed(u8 v) { return {(l4)v.low, (l4)v.high}; }
static inline u8 as_unsigned(l8 v) { return {(u4)v.low, (u4)v.high}; }
static inline d8 select(l8 mask, d8 a, d8 b) { return {mask.low ? a.low : b.low, mask.high ? a.high : b.high}; }
static inline l8 select(l8 mask, l8 a, l8 b) { return {mask.low ? a.low : b.low, mask.high ? a.high : b.high}; }

static inline int lanes_of(l8 mask) {
#ifdef __AVX2__
    return _mm256_movemask_pd((__m256d)mask.low) | _mm256_movemask_pd((__m256d)mask.high) << 4;
#else
    int lanes = 0;
    for (int lane = 0; lane < 4; lane++)
        lanes |= (mask.low[lane] < 0) << lane | (mask.high[lane] < 0) << (lane + 4);
    return lanes;
#endif
}

#endif

template <class Vector, class Number>
static inline Vector load(const Number *from) {
    Vector vector;
    memcpy(&vector, from, sizeof vector);
    return vector;
}

template <class Vector, class Number>
static inline void store(Number *to, Vector vector) { memcpy(to, &vector, sizeof vector); }

// The same place, which the compiler must read: taken out of a vector that has been read before, numbers would go through
// the two ports that all vectors share.
template <class Number>
static inline const Number *again(const Number *at) {
    asm("" : "+r"(at));
    return at;
}

// Have the second cache fetch memory that is read soon.
static inline void ask_for(const void *at) { __builtin_prefetch(at, 0, 2); }

// Of a and b, b where a is NaN.
static inline f8 larger(f8 a, f8 b) { return a > b ? a : b; }
static inline f8 smaller(f8 a, f8 b) { return a < b ? a : b; }
static inline d8 larger(d8 a, d8 b) { return select(a > b, a, b); }
static inline d8 smaller(d8 a, d8 b) { return select(a < b, a, b); }

static inline f8 absolute(f8 v) { return (f8)((w8)v & INT32_MAX); }
static inline d8 absolute(d8 v) { return double_of(bits_of(v) & all(INT64_MAX)); }

static inline bool is_finite(double v) { return v - v == 0; }
static inline l8 is_finite(d8 v) { return v - v == all(0.0); }

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

template <class Number>
static inline f8 eight(const Number *from) {
    f8 v;
    for (int lane = 0; lane < LANES; lane++) v[lane] = from[lane];
    return v;
}

template <>
inline f8 eight<float>(const float *from) { return load<f8>(from); }
