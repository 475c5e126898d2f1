// What a unit gave, less its mean, and whether it fired, less how often: the left operands of a template's products.
//
// A slice is read twice: a mean comes before what is left of it. Sums are of doubles.

#pragma once

#include "sums.h"

// One slice of (l, s, unit); steps count numbers. `kernels/native_deviations.py` has the same.
struct Slice {
    const float *z, *a;   // z: 0 where it is a, and firing is not asked for
    float *rest, *fired;  // fired: 0 where firing is not asked for
    int64_t entries, positions, units;
    int64_t z_step[3], a_step[3], to_step[3];
    float *about_U;
    double *rest_U, *square_U, *fired_U;
};

template <class Value>
static inline Value from(const float *at);
template <>
inline f8 from<f8>(const float *at) { return load<f8>(at); }
template <>
inline float from<float>(const float *at) { return *at; }

static inline void to(float *at, f8 v) { store(at, v); }
static inline void to(float *at, float v) { *at = v; }
static inline f8 ones(f8 z) { return (f8)((z > 0) & (w8)(f8{} + 1.0f)); }
static inline float ones(float z) { return z > 0 ? 1.0f : 0.0f; }
static inline double widened(float v) { return v; }

// A line of n values `step` apart: Σa in double; in float32, which counts a slice exactly, how often it fires, and 0 or
// NaN for what is not finite.
template <class Value, class Sum>
static inline void look(const float *z, const float *a, int64_t z_step, int64_t a_step, int64_t n, Sum *sum, Value *fired,
                        Value *spoilt) {
    Sum sums[2] = {};
    int64_t i = 0;
    for (; i + 2 <= n; i += 2)
        for (int half = 0; half < 2; half++) {
            Value v = from<Value>(z + (i + half) * z_step);
            sums[half] += widened(from<Value>(a + (i + half) * a_step));
            *fired += ones(v), *spoilt += v - v;
        }
    for (; i < n; i++) {
        Value v = from<Value>(z + i * z_step);
        sums[0] += widened(from<Value>(a + i * a_step));
        *fired += ones(v), *spoilt += v - v;
    }
    *sum += sums[0] + sums[1];
}

// The same line again: write what is left, and add it and its squares up.
template <class Value, class Sum>
static inline void leave(const float *z, const float *a, int64_t z_step, int64_t a_step, float *rest,
                         float *fired, int64_t to_step, int64_t n, Value about, Value rate, Sum *sum, Sum *square) {
    Sum sums[2] = {}, squares[2] = {};
    for (int64_t i = 0; i < n; i++) {
        Value v = from<Value>(a + i * a_step) - about;
        to(rest + i * to_step, v);
        if (fired) to(fired + i * to_step, ones(from<Value>(z + i * z_step)) - rate);
        Sum wide = widened(v);
        sums[i & 1] += wide, squares[i & 1] += wide * wide;
    }
    *sum += sums[0] + sums[1], *square += squares[0] + squares[1];
}

// Presentations that are read together: their units' sums are taken up and put down once.
constexpr int TOGETHER = 8;

// Calls `take(rows, z, a, rest, fired)` for up to TOGETHER presentations after the other, in order.
template <class Take>
static inline void by_rows(const Slice &slice, Take take) {
    const float *z[TOGETHER], *a[TOGETHER];
    float *rest[TOGETHER], *fired[TOGETHER];
    int rows = 0;
    for (int64_t l = 0; l < slice.entries; l++)
        for (int64_t s = 0; s < slice.positions; s++) {
            int64_t to = l * slice.to_step[0] + s * slice.to_step[1];
            a[rows] = slice.a + l * slice.a_step[0] + s * slice.a_step[1];
            z[rows] = slice.z ? slice.z + l * slice.z_step[0] + s * slice.z_step[1] : a[rows];
            rest[rows] = slice.rest + to, fired[rows] = slice.fired ? slice.fired + to : 0;
            if (++rows == TOGETHER) take(rows, z, a, rest, fired), rows = 0;
        }
    if (rows) take(rows, z, a, rest, fired);
}

// Units from `first` to `units`, BLOCKS times eight at a time, whose values lie side by side: memory is read and written
// as it lies, and sums wait in rest_U, square_U and fired_U.
template <int BLOCKS, bool Z>
static bool of_blocks(const Slice &slice, int64_t first, int64_t units) {
    constexpr int64_t STEP = BLOCKS * LANES;
    d8 none = {};
    f8 spoilt = {};
    double n = (double)slice.entries * slice.positions;
    for (int64_t unit = first; unit < units; unit += LANES)
        store(slice.rest_U + unit, none), store(slice.fired_U + unit, none);
    by_rows(slice, [&](int rows, const float **z, const float **a, float **, float **) {
        for (int64_t unit = first; unit < units; unit += STEP) {
            d8 sum[BLOCKS];
            f8 fired[BLOCKS] = {};
            for (int b = 0; b < BLOCKS; b++) sum[b] = load<d8>(slice.rest_U + unit + b * LANES);
            for (int row = 0; row < rows; row++)
                for (int b = 0; b < BLOCKS; b++) {
                    f8 given = load<f8>(a[row] + unit + b * LANES), v = Z ? load<f8>(z[row] + unit + b * LANES) : given;
                    sum[b] += widened(given), spoilt += v - v;
                    if (Z) fired[b] += ones(v);
                }
            for (int b = 0; b < BLOCKS; b++) {
                double *fires = slice.fired_U + unit + b * LANES;
                store(slice.rest_U + unit + b * LANES, sum[b]);
                if (Z) store(fires, load<d8>(fires) + widened(fired[b]));
            }
        }
    });
    for (int lane = 0; lane < LANES; lane++)
        if (spoilt[lane] != 0) return false;
    for (int64_t unit = first; unit < units; unit++) slice.about_U[unit] = slice.rest_U[unit] / n;
    for (int64_t unit = first; unit < units; unit += LANES)
        store(slice.rest_U + unit, none), store(slice.square_U + unit, none);
    by_rows(slice, [&](int rows, const float **z, const float **a, float **to_rest, float **to_fired) {
        for (int64_t unit = first; unit < units; unit += STEP) {
            d8 rest[BLOCKS], square[BLOCKS];
            f8 about[BLOCKS], rate[BLOCKS];
            for (int b = 0; b < BLOCKS; b++) {
                int64_t at = unit + b * LANES;
                rest[b] = load<d8>(slice.rest_U + at), square[b] = load<d8>(slice.square_U + at);
                about[b] = load<f8>(slice.about_U + at);
                rate[b] = narrowed(load<d8>(slice.fired_U + at)) / (float)n;
            }
            for (int row = 0; row < rows; row++) {
                for (int b = 0; b < BLOCKS; b++) {
                    f8 v = load<f8>(a[row] + unit + b * LANES) - about[b];
                    store(to_rest[row] + unit + b * LANES, v);
                    d8 wide = widened(v);
                    rest[b] += wide, square[b] += wide * wide;
                }
                if (!Z || !to_fired[row]) continue;
                for (int b = 0; b < BLOCKS; b++)
                    store(to_fired[row] + unit + b * LANES, ones(load<f8>(z[row] + unit + b * LANES)) - rate[b]);
            }
            for (int b = 0; b < BLOCKS; b++) {
                int64_t at = unit + b * LANES;
                store(slice.rest_U + at, rest[b]), store(slice.square_U + at, square[b]);
            }
        }
    });
    return true;
}

static inline float total(f8 v) {
    float all = 0;
    for (int lane = 0; lane < LANES; lane++) all += v[lane];
    return all;
}

// One unit, whose positions lie side by side where every step along them is 1.
static bool of_one(const Slice &slice, int64_t unit) {
    bool lines = slice.z_step[1] == 1 && slice.a_step[1] == 1 && slice.to_step[1] == 1;
    int64_t eights = lines ? slice.positions / LANES : 0, done = eights * LANES, left = slice.positions - done;
    const float *a = slice.a + unit * slice.a_step[2], *z = slice.z ? slice.z + unit * slice.z_step[2] : a;
    d8 wide = {};
    f8 fired8 = {}, spoilt8 = {};
    double sum = 0;
    float fired = 0, spoilt = 0;
    for (int64_t l = 0; l < slice.entries; l++) {
        const float *zl = z + l * slice.z_step[0], *al = a + l * slice.a_step[0];
        look<f8, d8>(zl, al, LANES, LANES, eights, &wide, &fired8, &spoilt8);
        look<float, double>(zl + done * slice.z_step[1], al + done * slice.a_step[1], slice.z_step[1], slice.a_step[1],
                            left, &sum, &fired, &spoilt);
    }
    if (spoilt != 0 || total(spoilt8) != 0) return false;
    double n = (double)slice.entries * slice.positions;
    fired += total(fired8);
    float about = (sum + total(wide)) / n, rate = fired / (float)n;
    d8 rest8 = {}, square8 = {};
    double rest = 0, square = 0;
    for (int64_t l = 0; l < slice.entries; l++) {
        const float *zl = z + l * slice.z_step[0], *al = a + l * slice.a_step[0];
        float *to_rest = slice.rest + l * slice.to_step[0] + unit * slice.to_step[2];
        float *to_fired = slice.fired ? slice.fired + l * slice.to_step[0] + unit * slice.to_step[2] : 0;
        leave<f8, d8>(zl, al, LANES, LANES, to_rest, to_fired, LANES, eights, f8{} + about, f8{} + rate, &rest8,
                      &square8);
        leave<float, double>(zl + done * slice.z_step[1], al + done * slice.a_step[1], slice.z_step[1],
                             slice.a_step[1], to_rest + done * slice.to_step[1],
                             to_fired ? to_fired + done * slice.to_step[1] : 0, slice.to_step[1], left, about, rate,
                             &rest, &square);
    }
    slice.about_U[unit] = about, slice.fired_U[unit] = fired;
    slice.rest_U[unit] = rest + total(rest8), slice.square_U[unit] = square + total(square8);
    return true;
}

// 0, or −1 where z is not finite somewhere: then nothing is to be used.
static int deviate(const Slice &slice) {
    bool beside = slice.z_step[2] == 1 && slice.a_step[2] == 1 && slice.to_step[2] == 1 && slice.units > 1;
    int64_t unit = 0, wide = beside ? slice.units / (4 * LANES) * (4 * LANES) : 0, all = slice.units / LANES * LANES;
    if (wide && !(slice.z ? of_blocks<4, true> : of_blocks<4, false>)(slice, 0, wide)) return -1;
    if (beside && all > wide && !(slice.z ? of_blocks<1, true> : of_blocks<1, false>)(slice, wide, all)) return -1;
    if (beside) unit = all;
    for (; unit < slice.units; unit++)
        if (!of_one(slice, unit)) return -1;
    return 0;
}
