// Tiles: the presentations of a run to eight units, side by side, as every pass reads them.
//
// z, a and y are read where they are, by their strides. A tile stays in the nearest caches while it is passed over.

#pragma once

#include "task.h"

// presentations by which memory is asked for before it is read
static const int AHEAD = 32;

// A run of rows: presentations start … start + n − 1.
struct Rows {
    int64_t row, rows, start, n;
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

// Where the presentations of a run are, for unit 0.
static void locate(const Task &task, const int64_t *stride, const Rows &rows, int64_t *offset) {
    if (task.entry_P) {
        for (int64_t p = 0; p < rows.n; p++)
            offset[p] = task.entry_P[rows.start + p] * stride[0] + task.index_P[rows.start + p] * stride[1];
        return;
    }
    int64_t positions = task.first_N[1];
    for (int64_t r = 0; r < rows.rows; r++)
        for (int64_t s = 0; s < positions; s++) *offset++ = (rows.row + r) * stride[0] + s * stride[1];
}

// The first `units` lanes of eight numbers `step` apart, 0 in the others.
template <class Number>
static inline f8 lanes_at(const Number *from, int64_t step, int64_t units) {
    f8 v = {};
    for (int64_t lane = 0; lane < units && lane < LANES; lane++) v[lane] = from[lane * step];
    return v;
}

// Units that are neighbours in memory: each presentation is a run of them.
template <class Number>
static void gather_units(const Number *from, const int64_t *offset, int64_t n, int64_t units, float *tile, int64_t length) {
    for (int64_t p = 0; p < n; p++) {
        // the strides are too large for the processor to see them coming
        if (p + AHEAD < n)
            for (int64_t line = 0; line < units; line += 64 / sizeof(Number))
                __builtin_prefetch(from + offset[p + AHEAD] + line, 0, 2);
        const Number *at = from + offset[p];
        float *to = tile + LANES * p;
        int64_t unit = 0;
        for (; unit + LANES <= units; unit += LANES, to += length) store(to, eight(at + unit));
        if (unit < units) store(to, lanes_at(at + unit, 1, units - unit));
    }
}

// Positions that are neighbours in memory, as a convolution has them: eight of eight units are turned at a time.
template <class Number>
static void gather_positions(const Number *from, int64_t step, int64_t n, int64_t units, float *tile) {
    int64_t p = 0;
    if (units >= LANES)
        for (; p + 8 <= n; p += 8) {
            f8 block[8];
            for (int lane = 0; lane < LANES; lane++) block[lane] = eight(from + lane * step + p);
            transpose(block);
            for (int i = 0; i < 8; i++) store(tile + LANES * (p + i), block[i]);
        }
    for (; p < n; p++) store(tile + LANES * p, lanes_at(from + p, step, units));
}

// Copy a run of the units first … first + units − 1 to tiles of eight, `length` apart; lanes beyond hold 0.
template <class Number>
static void gather(const Task &task, const void *memory, const int64_t *stride, const Rows &rows, int64_t first,
                   int64_t units, int64_t *offset, float *tile, int64_t length) {
    const Number *from = (const Number *)memory + first * stride[2];
    if (!task.entry_P && stride[1] == 1 && stride[2] != 1) {
        int64_t positions = task.first_N[1];
        for (int64_t unit = 0; unit < units; unit += LANES, tile += length)
            for (int64_t r = 0; r < rows.rows; r++)
                gather_positions(from + (rows.row + r) * stride[0] + unit * stride[2], stride[2], positions,
                                 units - unit, tile + LANES * r * positions);
        return;
    }
    locate(task, stride, rows, offset);
    if (stride[2] == 1) return gather_units(from, offset, rows.n, units, tile, length);
    for (int64_t unit = 0; unit < units; unit += LANES, tile += length)
        for (int64_t p = 0; p < rows.n; p++)
            store(tile + LANES * p, lanes_at(from + offset[p] + unit * stride[2], stride[2], units - unit));
}

static void fill_tiles(const Task &task, int tensor, const Rows &rows, int64_t first, int64_t units, const Work &work) {
    const int64_t *stride = task.stride[tensor];
    const void *memory = task.memory[tensor];
    float *tile = work.tile[tensor];
    switch (task.type[tensor]) {
        case FLOAT32: return gather<float>(task, memory, stride, rows, first, units, work.offset, tile, work.length);
        case BFLOAT16: return gather<BFloat16>(task, memory, stride, rows, first, units, work.offset, tile, work.length);
        case FLOAT16: return gather<Float16>(task, memory, stride, rows, first, units, work.offset, tile, work.length);
    }
}
