// Moments of a block: the values of eight units at some presentations, side by side.
//
// They are summed around a centre, which is the unit's mean so far; where that turns out to be too far from the block's
// own mean for the digits of a double, the block is summed again around the latter. Blocks are merged by the pairwise
// updates of Chan, Golub & LeVeque (1979) and Pébay (2008), as kernels/moments.py does with batches.

#pragma once

#include "bins.h"

// what is known of a unit's values, in the order of native_task.py's MOMENTS
enum { LOW, HIGH, ABSOLUTE, MEAN, M2, M3, M4 };

// presentations whose terms are added up before they join the rest: rounding grows with the terms of one sum
static const int64_t SEGMENT = 1024;
// mean² of the centred values up to this many times their variance costs less than one digit
static const double FAR = 4;

// Σ(v − centre)^p
struct Powers {
    d8 s1, s2, s3, s4;

    void add(d8 rest) {
        d8 square = rest * rest;
        s1 += rest, s2 += square, s3 += square * rest, s4 += square * square;
    }

    void add(const Powers &other) { s1 += other.s1, s2 += other.s2, s3 += other.s3, s4 += other.s4; }
};

// The values of a block: n presentations, `step` numbers apart, of which row r has first[r] … first[r + 1] − 1.
struct Values {
    const float *value;
    int64_t step;
    const int64_t *first;
    int64_t n, rows;
};

// The sums of a block, and Σ|v|; of max(v, 0) too where that is wanted, whose sum then stands for Σ|v|.
struct Sums {
    Powers own, rectified;
    d8 absolute;

    void add(const Sums &other) {
        own.add(other.own), rectified.add(other.rectified);
        absolute += other.absolute;
    }
};

// What is summed of values one after the other, with the extremes of a row; their raw bins are counted if COUNTED.
template <bool RECTIFIED, bool COUNTED>
struct Sweep {
    Sums sums;
    f8 high, low, least;

    void begin_row() { high = f8{} - __builtin_inff(), low = f8{} + __builtin_inff(); }

    void add(const float *at, d8 centre, d8 rectified_centre, Counts *counts) {
        f8 narrow = load<f8>(at);
        d8 v = widened(narrow);
        high = larger(narrow, high), low = smaller(narrow, low);
        sums.own.add(v - centre);
        if (RECTIFIED)
            sums.rectified.add(larger(v, d8{}) - rectified_centre);
        else
            sums.absolute += absolute(v);
        if (COUNTED) count_raw<1>(counts, at), least = smaller(absolute(narrow), least);
    }
};

// Let the smallest magnitudes of eight units' counts not be above these.
static void lower(Counts *counts, f8 least) {
    for (int lane = 0; lane < LANES; lane++)
        if (least[lane] < counts[lane].smallest) counts[lane].smallest = least[lane];
}

// Memory that is read next: asked for while values are summed, `step` bytes a presentation, `row` bytes from row to row.
struct Ahead {
    const char *at;
    int64_t row, step;
};

// Add up the moments of values and the extremes of every row; count the raw bins if there are `counts`.
template <bool RECTIFIED, bool COUNTED>
static Sums sweep(const Values &values, d8 centre, d8 rectified_centre, float *greatest, float *smallest, Counts *counts,
                  const Ahead &ahead) {
    Sums complete = {};
    Sweep<RECTIFIED, COUNTED> sweep = {};
    sweep.least = f8{} + __builtin_inff();
    int64_t pending = 0;
    for (int64_t r = 0; r < values.rows; r++) {
        sweep.begin_row();
        const char *next = ahead.at ? ahead.at + r * ahead.row : (const char *)values.value;
        for (int64_t p = values.first[r]; p < values.first[r + 1]; p++, next += ahead.step) {
            __builtin_prefetch(next, 0, 2);
            sweep.add(values.value + values.step * p, centre, rectified_centre, counts);
            if (++pending == SEGMENT) {
                complete.add(sweep.sums);
                sweep.sums = Sums{}, pending = 0;
            }
        }
        store(greatest + LANES * r, sweep.high), store(smallest + LANES * r, sweep.low);
    }
    if (COUNTED) lower(counts, sweep.least);
    complete.add(sweep.sums);
    return complete;
}

static l8 is_far(double n, d8 s1, d8 s2) {
    d8 d = s1 / all(n);
    return d * d * all(n) > all(FAR) * (s2 - d * s1);
}

// The mean of the first values; of equal values exactly that value.
static d8 near_mean(const Values &values) {
    int64_t few = values.n < 32 ? values.n : 32;
    d8 sum = {};
    for (int64_t p = 0; p < few; p++) sum += widened(load<f8>(values.value + values.step * p));
    return sum / all((double)few);
}

// The numbers of eight units among those of all, `step` from one kind of number to the next.
struct Numbers {
    double *first;
    int64_t step;

    d8 operator[](int which) const { return load<d8>(first + which * step); }
    void set(int which, l8 active, d8 v) const { store(first + which * step, select(active, v, (*this)[which])); }
};

// The extremes of a block.
struct Extent {
    d8 low, high;
};

static Extent extent_of(const float *greatest, const float *smallest, int64_t rows) {
    const f8 infinite = f8{} + __builtin_inff();
    f8 high = -infinite, low = infinite;
    for (int64_t r = 0; r < rows; r++)
        high = larger(load<f8>(greatest + LANES * r), high), low = smaller(load<f8>(smallest + LANES * r), low);
    return {widened(low), widened(high)};
}

// Merge a block of n presentations into the moments of its units, which have seen `before`.
static void merge(const Numbers &state, l8 active, d8 before, double n_block, const Extent &extent, d8 centre,
                  d8 absolute, const Powers &sums) {
    d8 n = all(n_block), d = sums.s1 / n, mean = smaller(extent.high, larger(extent.low, centre + d));
    d8 m2 = sums.s2 - sums.s1 * d;
    d8 m3 = sums.s3 - all(3.0) * d * sums.s2 + all(2.0) * n * d * d * d;
    d8 m4 = sums.s4 - all(4.0) * d * sums.s3 + all(6.0) * d * d * sums.s2 - all(3.0) * n * d * d * d * d;
    // of units that have seen nothing all numbers are 0, and so is f
    d8 total = before + n, f = before / total, g = n / total, step = mean - state[MEAN], square = step * step;
    d8 of_m4 = square * square * (total * f * g * (f * f - f * g + g * g)) +
               all(6.0) * square * (f * f * m2 + g * g * state[M2]) + all(4.0) * step * (f * m3 - g * state[M3]);
    d8 of_m3 = square * step * (total * f * g * (f - g)) + all(3.0) * step * (f * m2 - g * state[M2]);
    state.set(M4, active, state[M4] + m4 + of_m4);
    state.set(M3, active, state[M3] + m3 + of_m3);
    state.set(M2, active, state[M2] + m2 + square * (total * f * g));
    state.set(MEAN, active, state[MEAN] + step * g);
    state.set(ABSOLUTE, active, state[ABSOLUTE] + absolute);
    state.set(LOW, active, smaller(extent.low, state[LOW]));
    state.set(HIGH, active, larger(extent.high, state[HIGH]));
}
