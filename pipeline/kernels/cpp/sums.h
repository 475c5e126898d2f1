// Σx, Σx² and Σ(x − x̄)² of the inputs of every presentation: what match needs of x (sites.InputSums).

#pragma once

#include "vectors.h"

template <class Number>
static inline d4 widened_of(const Number *from) {
    d4 v;
    for (int lane = 0; lane < 4; lane++) v[lane] = (float)from[lane];
    return v;
}

template <>
inline d4 widened_of<float>(const float *from) { return widened(from); }

// The sums of one vector of n inputs.
template <class Number>
static void sum_vector(const Number *x, int64_t n, double *sum_, double *square_, double *centred_) {
    d4 s[2] = {}, q[2] = {};
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        for (int half = 0; half < 2; half++) {
            d4 v = widened_of(x + i + 4 * half);
            s[half] += v, q[half] += v * v;
        }
    double all = sum(s[0] + s[1]), square = sum(q[0] + q[1]);
    for (int64_t j = i; j < n; j++) {
        double v = (float)x[j];
        all += v, square += v * v;
    }
    double mean = n ? all / n : 0, centred = 0;
    const d4 around = d4{} + mean;
    d4 c[2] = {};
    for (int64_t j = 0; j < i; j += 8)
        for (int half = 0; half < 2; half++) {
            d4 rest = widened_of(x + j + 4 * half) - around;
            c[half] += rest * rest;
        }
    centred = sum(c[0] + c[1]);
    for (; i < n; i++) {
        double rest = (float)x[i] - mean;
        centred += rest * rest;
    }
    *sum_ = all, *square_ = square, *centred_ = centred;
}

// The mean of the finite values.
template <class Number>
static double mean_of(const Number *x, int64_t n) {
    d4 s[4] = {};
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
        for (int part = 0; part < 4; part++) s[part] += widened_of(x + i + 4 * part);
    double all = sum((s[0] + s[1]) + (s[2] + s[3]));
    for (; i < n; i++) all += (float)x[i];
    if (!is_finite(all)) {
        all = 0;
        for (i = 0; i < n; i++)
            if (is_finite((float)x[i])) all += (float)x[i];
    }
    return n ? all / n : 0;
}

// Over channels `step` apart, at each of n positions: Σx, Σx² and Σ(x − centre)².
template <class Number>
static void sum_channels(const Number *x, int64_t channels, int64_t step, int64_t n, double centre, double *sum_,
                         double *square, double *rest_) {
    const d4 around = d4{} + centre;
    int64_t p = 0;
    for (; p + 8 <= n; p += 8) {
        d4 s[2] = {}, q[2] = {}, r[2] = {};
        for (int64_t channel = 0; channel < channels; channel++)
            for (int half = 0; half < 2; half++) {
                d4 v = widened_of(x + channel * step + p + 4 * half), rest = v - around;
                s[half] += v, q[half] += v * v, r[half] += rest * rest;
            }
        for (int half = 0; half < 2; half++) {
            store(sum_ + p + 4 * half, s[half]);
            store(square + p + 4 * half, q[half]);
            store(rest_ + p + 4 * half, r[half]);
        }
    }
    for (; p < n; p++) {
        double s = 0, q = 0, r = 0;
        for (int64_t channel = 0; channel < channels; channel++) {
            double v = (float)x[channel * step + p], rest = v - centre;
            s += v, q += v * v, r += rest * rest;
        }
        sum_[p] = s, square[p] = q, rest_[p] = r;
    }
}

// One axis of a window.
struct WindowAxis {
    int64_t size, kernel, stride, dilation, before, after, out;
};

// Sum along one axis of (outer, size, inner) over the taps of a window: (outer, out, inner).
static void box(const double *from, double *to, int64_t outer, int64_t size, int64_t inner, const WindowAxis &axis) {
    for (int64_t o = 0; o < outer; o++)
        for (int64_t k = 0; k < axis.kernel; k++)
            if (inner == 1) {
                const double *tap = from + o * size + k * axis.dilation;
                double *line = to + o * axis.out;
                for (int64_t j = 0; j < axis.out; j++) line[j] = (k ? line[j] : 0) + tap[j * axis.stride];
            } else {
                for (int64_t j = 0; j < axis.out; j++) {
                    const double *tap = from + (o * size + j * axis.stride + k * axis.dilation) * inner;
                    double *line = to + (o * axis.out + j) * inner;
                    for (int64_t i = 0; i < inner; i++) line[i] = (k ? line[i] : 0) + tap[i];
                }
            }
}

// What a convolution's windows over three axes (of size 1 where it has fewer) are summed with.
struct Windows {
    const void *x;
    int64_t type, entries, channels, groups, stride_entry;
    WindowAxis axis[3];
    double *sum_LGS, *square_LGS, *centred_LGS;
};

template <class Number>
static int sum_windows(const Windows &windows) {
    const WindowAxis *axis = windows.axis;
    int64_t of_group = windows.channels / windows.groups, positions = 1, padded = 1, out = 1, taps = of_group;
    int64_t width[3];
    for (int i = 0; i < 3; i++) {
        width[i] = axis[i].size + axis[i].before + axis[i].after;
        positions *= axis[i].size, padded *= width[i], out *= axis[i].out, taps *= axis[i].kernel;
    }
    double *memory = (double *)malloc((3 * positions + 3 * padded) * sizeof(double));
    if (!memory) return -1;
    double *plain = memory, *image = memory + 3 * positions, *one = image + padded, *two = one + padded;
    for (int64_t entry = 0; entry < windows.entries; entry++) {
        const Number *x = (const Number *)windows.x + entry * windows.stride_entry;
        double mean = mean_of(x, windows.channels * positions);
        for (int64_t group = 0; group < windows.groups; group++) {
            sum_channels(x + group * of_group * positions, of_group, positions, positions, mean, plain,
                         plain + positions, plain + 2 * positions);
            int64_t at = (entry * windows.groups + group) * out;
            double *to[3] = {windows.sum_LGS + at, windows.square_LGS + at, windows.centred_LGS + at};
            for (int which = 0; which < 3; which++) {
                // padding is 0, which lies −mean from the centre
                double outside = which == 2 ? of_group * mean * mean : 0;
                for (int64_t i = 0; i < padded; i++) image[i] = outside;
                const double *line = plain + which * positions;
                for (int64_t i = 0; i < axis[0].size; i++)
                    for (int64_t j = 0; j < axis[1].size; j++, line += axis[2].size)
                        memcpy(image + ((i + axis[0].before) * width[1] + j + axis[1].before) * width[2] +
                                   axis[2].before,
                               line, axis[2].size * sizeof(double));
                box(image, one, width[0] * width[1], width[2], 1, axis[2]);
                box(one, two, width[0], width[1], axis[2].out, axis[1]);
                box(two, to[which], 1, width[0], axis[1].out * axis[2].out, axis[0]);
            }
            for (int64_t p = 0; p < out; p++) {
                // Σ(x − x̄)² = Σ(x − c)² − (Σx − n·c)²/n for any c: of 0 and the mean, what cancels less
                bool around = to[2][p] < to[1][p];
                double rest = to[0][p] - (around ? taps * mean : 0);
                double centred = to[around ? 2 : 1][p] - rest * rest / taps;
                to[2][p] = centred < 0 ? 0 : centred;
            }
        }
    }
    free(memory);
    return 0;
}
