// Moments of a run: the values that one unit gives at some presentations, contiguous in memory.
//
// They are summed around a centre, which is the unit's mean so far; where that turns out to be too far from the run's
// own mean for the digits of a double, the run is summed again around the latter. Runs are merged by the pairwise
// updates of Chan, Golub & LeVeque (1979) and Pébay (2008), as kernels/moments.py does with batches.

#pragma once

#include "vectors.h"

// one unit's moments
struct Moments {
    double min, max, absolute, mean, m2, m3, m4;
};

// Σ|v| and Σ(v − centre)^p
struct PowerSums {
    double absolute, s1, s2, s3, s4;
};

// mean² of the centred values up to this many times their variance costs less than one digit
static const double FAR = 4;

// Rectified values are max(v, 0).
template <bool RECTIFIED>
static PowerSums power_sums(const float *value, int64_t n, double centre) {
    d4 absolute_[2] = {}, s1[2] = {}, s2[2] = {}, s3[2] = {}, s4[2] = {};
    const d4 zero = {}, around = zero + centre;
    int64_t p = 0;
    for (; p + 8 <= n; p += 8)
        for (int half = 0; half < 2; half++) {
            d4 v = widened(value + p + 4 * half);
            if (RECTIFIED) v = larger(v, zero);
            d4 rest = v - around, square = rest * rest;
            absolute_[half] += RECTIFIED ? v : absolute(v);
            s1[half] += rest;
            s2[half] += square;
            s3[half] += square * rest;
            s4[half] += square * square;
        }
    PowerSums sums = {sum(absolute_[0] + absolute_[1]), sum(s1[0] + s1[1]), sum(s2[0] + s2[1]), sum(s3[0] + s3[1]),
                      sum(s4[0] + s4[1])};
    for (; p < n; p++) {
        double v = RECTIFIED && !(value[p] > 0) ? 0 : value[p], rest = v - centre, square = rest * rest;
        sums.absolute += absolute(v);
        sums.s1 += rest;
        sums.s2 += square;
        sums.s3 += square * rest;
        sums.s4 += square * square;
    }
    return sums;
}

static bool is_far(int64_t n, double s1, double s2) {
    double d = s1 / n;
    return d * d * n > FAR * (s2 - d * s1);
}

// The mean of the first values; of equal values exactly that value.
static double near_mean(const float *value, int64_t n) {
    int64_t few = n < 32 ? n : 32;
    double sum_ = 0;
    for (int64_t p = 0; p < few; p++) sum_ += value[p];
    return sum_ / few;
}

static void merge(Moments *state, int64_t n_before, int64_t n_run, double low, double high, double centre,
                  const PowerSums &sums) {
    double n = (double)n_run, d = sums.s1 / n, mean = centre + d;
    mean = mean < low ? low : mean > high ? high : mean;
    double m2 = sums.s2 - sums.s1 * d;
    double m3 = sums.s3 - 3 * d * sums.s2 + 2 * n * d * d * d;
    double m4 = sums.s4 - 4 * d * sums.s3 + 6 * d * d * sums.s2 - 3 * n * d * d * d * d;
    if (n_before == 0) {
        state->mean = mean, state->m2 = m2, state->m3 = m3, state->m4 = m4;
    } else {
        double before = (double)n_before, total = before + n, f = before / total, g = n / total;
        double step = mean - state->mean, square = step * step;
        state->m4 += m4 + square * square * (total * f * g * (f * f - f * g + g * g)) +
                     6 * square * (f * f * m2 + g * g * state->m2) + 4 * step * (f * m3 - g * state->m3);
        state->m3 += m3 + square * step * (total * f * g * (f - g)) + 3 * step * (f * m2 - g * state->m2);
        state->m2 += m2 + square * (total * f * g);
        state->mean += step * g;
    }
    state->absolute += sums.absolute;
    state->min = smaller(state->min, low);
    state->max = larger(state->max, high);
}

// Merge a run whose sums around `centre` are known.
template <bool RECTIFIED>
static void add_moments(Moments *state, int64_t n_before, const float *value, int64_t n, double low, double high,
                        double centre, PowerSums sums) {
    if (is_far(n, sums.s1, sums.s2)) {
        centre += sums.s1 / n;
        sums = power_sums<RECTIFIED>(value, n, centre);
    }
    merge(state, n_before, n, low, high, centre, sums);
}

// Counts and extremes of z.
struct Extent {
    int64_t zero, fired;
    float low, high, least;  // least: the smallest |z| other than 0, infinity if there is none
};

static Extent extent_of(const float *z, int64_t n) {
    const f8 none = {}, infinite = none + __builtin_inff();
    f8 low = infinite, high = -infinite, least = infinite;
    w8 zero = {}, fired = {};
    int64_t p = 0;
    for (; p + 8 <= n; p += 8) {
        f8 v = load<f8>(z + p);
        low = smaller(v, low), high = larger(v, high);
        w8 is_zero = v == none;
        zero -= is_zero, fired -= v > none;
        // of a zero, whose bits are 0, the mask leaves the bits of infinity
        least = smaller((f8)(((w8)v & INT32_MAX) | (is_zero & (w8)infinite)), least);
    }
    Extent extent = {0, 0, __builtin_inff(), -__builtin_inff(), __builtin_inff()};
    for (int lane = 0; lane < 8; lane++) {
        extent.zero += zero[lane], extent.fired += fired[lane];
        extent.low = smaller(low[lane], extent.low), extent.high = larger(high[lane], extent.high);
        extent.least = smaller(least[lane], extent.least);
    }
    for (; p < n; p++) {
        float v = z[p], magnitude = v < 0 ? -v : v;
        extent.zero += v == 0, extent.fired += v > 0;
        extent.low = smaller(v, extent.low), extent.high = larger(v, extent.high);
        if (v != 0) extent.least = smaller(magnitude, extent.least);
    }
    return extent;
}
