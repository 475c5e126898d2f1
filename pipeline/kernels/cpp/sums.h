// Σx, Σx² and Σ(x − x̄)² of the inputs of every presentation: what match needs of x (sites.InputSums).

#pragma once

#include "vectors.h"

// Sums of n inputs v, and of their distance from a centre.
struct InputSums {
    d8 sum, square, rest;

    void add(d8 v, d8 centre) {
        d8 apart = v - centre;
        sum += v, square += v * v, rest += apart * apart;
    }
};

static inline double total(d8 v) {
    double lane[LANES];
    store(lane, v);
    return ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
}

// Σ(x − x̄)² = Σ(x − c)² − (Σx − n·c)²/n for any c.
static inline double centred_from(double rest, double sum, double n, double centre) {
    double apart = sum - n * centre, centred = rest - apart * apart / n;
    return centred < 0 ? 0 : centred;
}

// The sums of one vector of n inputs, in one pass around the first of them, which costs at most log2 n bits of them.
template <class Number>
static void sum_vector(const Number *x, int64_t n, double *sum_, double *square_, double *centred_) {
    double centre = n ? (float)x[0] : 0;
    InputSums sums[2] = {};
    int64_t i = 0;
    for (; i + 2 * LANES <= n; i += 2 * LANES)
        for (int half = 0; half < 2; half++) sums[half].add(widened(eight(x + i + LANES * half)), all(centre));
    double sum = total(sums[0].sum + sums[1].sum), square = total(sums[0].square + sums[1].square);
    double rest = total(sums[0].rest + sums[1].rest);
    for (; i < n; i++) {
        double v = (float)x[i], apart = v - centre;
        sum += v, square += v * v, rest += apart * apart;
    }
    *sum_ = sum, *square_ = square, *centred_ = n ? centred_from(rest, sum, n, centre) : 0;
}

// channels of which one tells where the values lie
static const int64_t FEW = 8;

// The mean of the finite values of some channels of n positions.
template <class Number>
static double near_mean(const Number *x, int64_t channels, int64_t n) {
    double all_ = 0;
    int64_t count = 0;
    for (int64_t channel = 0; channel < channels; channel += FEW) {
        const Number *at = x + channel * n;
        d8 sums[2] = {};
        int64_t p = 0;
        for (; p + 2 * LANES <= n; p += 2 * LANES)
            for (int half = 0; half < 2; half++) sums[half] += widened(eight(at + p + LANES * half));
        double sum = total(sums[0] + sums[1]);
        for (; p < n; p++) sum += (float)at[p];
        if (is_finite(sum)) all_ += sum, count += n;
    }
    return count ? all_ / count : 0;
}

// Over channels `step` apart, at each of n positions: Σx, Σx² and Σ(x − centre)².
template <class Number>
static void sum_channels(const Number *x, int64_t channels, int64_t step, int64_t n, double centre, double *sum,
                         double *square, double *rest) {
    int64_t p = 0;
    for (; p + 2 * LANES <= n; p += 2 * LANES) {
        InputSums sums[2] = {};
        for (int64_t channel = 0; channel < channels; channel++)
            for (int half = 0; half < 2; half++)
                sums[half].add(widened(eight(x + channel * step + p + LANES * half)), all(centre));
        for (int half = 0; half < 2; half++) {
            store(sum + p + LANES * half, sums[half].sum);
            store(square + p + LANES * half, sums[half].square);
            store(rest + p + LANES * half, sums[half].rest);
        }
    }
    for (; p < n; p++) {
        double s = 0, q = 0, r = 0;
        for (int64_t channel = 0; channel < channels; channel++) {
            double v = (float)x[channel * step + p], apart = v - centre;
            s += v, q += v * v, r += apart * apart;
        }
        sum[p] = s, square[p] = q, rest[p] = r;
    }
}

// One axis of a window.
struct WindowAxis {
    int64_t size, kernel, stride, dilation, before, after, out;
};

// Add n numbers `stride` apart to a line.
static inline void add_line(double *line, const double *from, int64_t stride, int64_t n) {
    // one after the other they are added as vectors
    if (stride == 1)
        for (int64_t i = 0; i < n; i++) line[i] += from[i];
    else
        for (int64_t i = 0; i < n; i++) line[i] += from[i * stride];
}

// Sum along one axis of (outer, size, inner) over the taps of a window: (outer, out, inner).
static void box(const double *from, double *to, int64_t outer, int64_t size, int64_t inner, const WindowAxis &axis) {
    memset(to, 0, outer * axis.out * inner * sizeof *to);
    for (int64_t o = 0; o < outer; o++, from += size * inner, to += axis.out * inner)
        for (int64_t k = 0; k < axis.kernel; k++) {
            const double *tap = from + k * axis.dilation * inner;
            if (inner == 1)
                add_line(to, tap, axis.stride, axis.out);
            else
                for (int64_t j = 0; j < axis.out; j++) add_line(to + j * inner, tap + j * axis.stride * inner, 1, inner);
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
        double mean = near_mean(x, windows.channels, positions);
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
                // of the centres 0 and the mean, what cancels less
                bool around = to[2][p] < to[1][p];
                to[2][p] = centred_from(to[around ? 2 : 1][p], to[0][p], taps, around ? mean : 0);
            }
        }
    }
    free(memory);
    return 0;
}
