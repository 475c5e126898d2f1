// Σx, Σx² and Σ(x − x̄)² of the inputs of every presentation: what match needs of x (input_forms.InputSums).

#pragma once

#include "vectors.h"

// Σ(x − x̄)² is Σx² − (Σx)²/n where that loses at most this many times of it, else summed around a mean.
static const double LOSS = 16;
// float32 in a page of memory
static const int64_t PAGE = 1024;

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

// The inputs of a vector as they lie in memory.
template <class Number>
struct Given {
    const Number *x;
    f8 eight_at(int64_t i) const { return eight(x + i); }
    float at(int64_t i) const { return x[i]; }
};

// What a layer norm without gain makes of them, rounded as torch rounds it.
struct Normalised {
    const float *x;
    float mean, scale;
    f8 eight_at(int64_t i) const { return (eight(x + i) - mean) * scale; }
    float at(int64_t i) const { return (x[i] - mean) * scale; }
};

// Σ(x − centre)² of one vector of n inputs.
template <class Inputs>
static double rest_of(const Inputs &inputs, int64_t n, double centre) {
    d8 sums[2] = {};
    int64_t i = 0;
    for (; i + 2 * LANES <= n; i += 2 * LANES)
        for (int half = 0; half < 2; half++) {
            d8 apart = widened(inputs.eight_at(i + LANES * half)) - all(centre);
            sums[half] += apart * apart;
        }
    double rest = total(sums[0] + sums[1]);
    for (; i < n; i++) {
        double apart = inputs.at(i) - centre;
        rest += apart * apart;
    }
    return rest;
}

// The sums of one vector of n inputs.
template <class Inputs>
static void sum_vector(const Inputs &inputs, int64_t n, double *sum_, double *square_, double *centred_) {
    const int PARTS = 4;
    d8 sums[PARTS] = {}, squares[PARTS] = {};
    int64_t i = 0;
    for (; i + PARTS * LANES <= n; i += PARTS * LANES)
        for (int part = 0; part < PARTS; part++) {
            __builtin_prefetch(inputs.x + i + LANES * part + PAGE, 0, 2);
            d8 v = widened(inputs.eight_at(i + LANES * part));
            sums[part] += v, squares[part] += v * v;
        }
    double sum = total((sums[0] + sums[2]) + (sums[1] + sums[3]));
    double square = total((squares[0] + squares[2]) + (squares[1] + squares[3]));
    for (; i < n; i++) {
        double v = inputs.at(i);
        sum += v, square += v * v;
    }
    double centred = n ? centred_from(square, sum, n, 0) : 0;
    if (LOSS * centred < square) centred = centred_from(rest_of(inputs, n, sum / n), sum, n, sum / n);
    *sum_ = sum, *square_ = square, *centred_ = centred;
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

// Add CHANNELS channels, each of n positions, to Σx and Σx² at each position, AROUND a centre to Σ(x − centre)².
//
// The processor asks for memory within a page of 4 KiB by itself, of which a channel may be one: the next channels, or
// what is a page ahead, are asked for here.
template <bool AROUND, int CHANNELS, class Number>
static inline void add_channels(const Number *x, int64_t n, double centre, double *sum, double *square) {
    const int64_t ahead = CHANNELS * n < PAGE ? PAGE : CHANNELS * n;
    int64_t p = 0;
    for (; p + LANES <= n; p += LANES) {
        d8 s = load<d8>(sum + p), q = load<d8>(square + p);
        for (int channel = 0; channel < CHANNELS; channel++) {
            __builtin_prefetch(x + channel * n + p + ahead, 0, 2);
            d8 v = widened(eight(x + channel * n + p));
            if (AROUND) v = v - all(centre);
            if (!AROUND) s += v;
            q += v * v;
        }
        if (!AROUND) store(sum + p, s);
        store(square + p, q);
    }
    for (; p < n; p++)
        for (int channel = 0; channel < CHANNELS; channel++) {
            double v = (float)x[channel * n + p];
            if (AROUND) v = v - centre;
            if (!AROUND) sum[p] += v;
            square[p] += v * v;
        }
}

// The same of all channels of n positions; some side by side, each read from its begin to its end.
template <bool AROUND, class Number>
static void sum_channels(const Number *x, int64_t channels, int64_t n, double centre, double *sum, double *square) {
    const int TOGETHER = 4;
    int64_t channel = 0;
    if (!AROUND) memset(sum, 0, n * sizeof *sum);
    memset(square, 0, n * sizeof *square);
    for (; channel + TOGETHER <= channels; channel += TOGETHER)
        add_channels<AROUND, TOGETHER>(x + channel * n, n, centre, sum, square);
    for (; channel < channels; channel++) add_channels<AROUND, 1>(x + channel * n, n, centre, sum, square);
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

// Memory of one call: sums at each position, and the padded image that windows are summed over.
struct WindowWork {
    int64_t positions, padded, out, taps, width[3];
    double *sum, *square, *rest, *image, *one, *two, *of_rest, *memory;
};

static bool prepare(WindowWork *work, const Windows &windows) {
    const WindowAxis *axis = windows.axis;
    work->positions = work->padded = work->out = 1, work->taps = windows.channels / windows.groups;
    for (int i = 0; i < 3; i++) {
        work->width[i] = axis[i].size + axis[i].before + axis[i].after;
        work->positions *= axis[i].size, work->padded *= work->width[i];
        work->out *= axis[i].out, work->taps *= axis[i].kernel;
    }
    work->memory = (double *)malloc((3 * work->positions + 3 * work->padded + work->out) * sizeof(double));
    if (!work->memory) return false;
    work->sum = work->memory, work->square = work->sum + work->positions, work->rest = work->square + work->positions;
    work->image = work->rest + work->positions, work->one = work->image + work->padded;
    work->two = work->one + work->padded, work->of_rest = work->two + work->padded;
    return true;
}

// Sum what is known of each position over every window; `outside` is that of padding.
static void over_windows(const WindowAxis *axis, const WindowWork &work, const double *line, double outside, double *to) {
    const int64_t *width = work.width;
    for (int64_t i = 0; i < work.padded; i++) work.image[i] = outside;
    for (int64_t i = 0; i < axis[0].size; i++)
        for (int64_t j = 0; j < axis[1].size; j++, line += axis[2].size)
            memcpy(work.image + ((i + axis[0].before) * width[1] + j + axis[1].before) * width[2] + axis[2].before, line,
                   axis[2].size * sizeof(double));
    box(work.image, work.one, width[0] * width[1], width[2], 1, axis[2]);
    box(work.one, work.two, width[0], width[1], axis[2].out, axis[1]);
    box(work.two, to, 1, width[0], axis[1].out * axis[2].out, axis[0]);
}

// Σ(x − x̄)² of every window of an entry's group from its other sums, as far as they tell; else around the entry's mean.
template <class Number>
static void centre_windows(const Windows &windows, const WindowWork &work, const Number *entry, const Number *x,
                           const double *sum, const double *square, double *centred) {
    bool lost = false;
    for (int64_t p = 0; p < work.out; p++) {
        centred[p] = centred_from(square[p], sum[p], work.taps, 0);
        lost |= LOSS * centred[p] < square[p];
    }
    if (!lost) return;
    int64_t channels = windows.channels / windows.groups;
    double mean = near_mean(entry, windows.channels, work.positions);
    sum_channels<true>(x, channels, work.positions, mean, work.sum, work.rest);
    // padding is 0, which lies −mean from the centre
    over_windows(windows.axis, work, work.rest, channels * mean * mean, work.of_rest);
    for (int64_t p = 0; p < work.out; p++)
        if (work.of_rest[p] < square[p]) centred[p] = centred_from(work.of_rest[p], sum[p], work.taps, mean);
}

template <class Number>
static int sum_windows(const Windows &windows) {
    WindowWork work;
    if (!prepare(&work, windows)) return -1;
    int64_t channels = windows.channels / windows.groups;
    for (int64_t entry = 0; entry < windows.entries; entry++) {
        const Number *of_entry = (const Number *)windows.x + entry * windows.stride_entry;
        for (int64_t group = 0; group < windows.groups; group++) {
            const Number *x = of_entry + group * channels * work.positions;
            int64_t at = (entry * windows.groups + group) * work.out;
            double *sum = windows.sum_LGS + at, *square = windows.square_LGS + at;
            sum_channels<false>(x, channels, work.positions, 0, work.sum, work.square);
            over_windows(windows.axis, work, work.sum, 0, sum);
            over_windows(windows.axis, work, work.square, 0, square);
            centre_windows(windows, work, of_entry, x, sum, square, windows.centred_LGS + at);
        }
    }
    free(work.memory);
    return 0;
}
