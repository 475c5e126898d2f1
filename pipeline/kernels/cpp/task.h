// One batch, what is wanted of it, the numbers that grow, and the memory of one call.

#pragma once

#include "rows.h"

// what Task.a_is says: a is z, max(z, 0), or given
enum { SAME, RECTIFIED, GIVEN };
enum { FLOAT32, BFLOAT16, FLOAT16 };
enum { Z, A, Y, TENSORS };
enum { N, NONFINITE, ZEROS, FIRED, ROWS, ROWS_FIRED };
// units gathered together where they are neighbours in memory: of float32 two cache lines of 64 bytes
static const int TILE = 4 * LANES;
// units and presentations of a panel, and positions of a row from which on there are panels
static const int PANEL_UNITS = 16 * LANES, PANEL = 16, PANEL_POSITIONS = 64;

// As native_task.py declares it; shapes by suffix as in the Python: P presentations, U units, G groups, N rows, B bins,
// C classes, J ways to label, K places of kept rows. There is room for `lanes` units, a multiple of eight.
struct Task {
    // what is shown: memory, type and strides (entry, position, unit) of z, a and y
    const void *memory[TENSORS];
    int64_t type[TENSORS], stride[TENSORS][3];
    // first presentation of each row, first row of each run; where presentations are, null if row is entry
    const int64_t *first_N, *run_R, *entry_P, *index_P;
    int64_t runs, presentations, units, lanes, groups;
    const double *sum_GP, *length_GP[FORMS];
    const double *bias_U, *mean_U, *scale_U[FORMS];
    int64_t finite_y;
    // what is wanted
    int64_t a_is, moments, bins, forms[FORMS], best_match, keeps, ways, classes, rows;
    Keeping keeping;
    const int64_t *label_JN;
    // what is grown
    int64_t *count_6U;
    double *z_7U, *a_7U;
    int64_t *top_U, *undefined_FU;
    // 32 bits are enough for as many presentations as are added to one state, see `accumulate.py`
    int32_t *bin_UB, *match_FU2B;
    double *match_F23U;
    int64_t *class_n_TJCL, *class_fired_TJCL;
    double *class_mean_TJCL, *class_m2_TJCL;
    Last *last_TC;
    int64_t places, *key_UK, *uid_UK, *position_UK;
    double *value_UK3;
};

// Whether runs are read in panels (panels.h): z, and a where it is given, lie presentation after presentation, and of
// matches no more is wanted than each row's best, for those of every value would be read once more.
static bool has_panels(const Task &task, int64_t longest) {
    if (!task.rows || task.entry_P || task.units % LANES || task.groups > 1 || task.memory[Y]) return false;
    if (task.forms[PEARSON] || task.forms[COSINE]) return false;
    int64_t positions = task.first_N[1];
    const int64_t *stride = task.stride[Z];
    for (int t = Z; t <= (task.a_is == GIVEN ? A : Z); t++) {
        const int64_t *of = task.stride[t];
        if (task.type[t] != FLOAT32 || of[2] != 1 || of[1] != stride[1] || of[0] != stride[0]) return false;
    }
    return positions >= PANEL_POSITIONS && longest <= SEGMENT && (task.rows == 1 || stride[0] == positions * stride[1]);
}

// Sums of eight units' values that grow from panel to panel.
struct Growing {
    Sums sums;
    d8 centre, rectified_centre;
    f8 least;
};

// Memory of one call; the longest run has `longest` presentations, a tile of z, a or y `length` numbers, the most rows of
// a run are `rows`.
struct Work {
    int64_t width, longest, length, rows;
    bool panels;
    Growing *growing[2];  // of z and a
    float *tile[TENSORS], *finite[TENSORS];
    double *apart[3], *finite_x[3];
    float *greatest, *smallest, *output, *least_output;
    double *match;
    int64_t *first, *finite_first, *where, *offset;
    Counts *counts, *spare;
    char *memory;
};

template <class Number>
static void take(char **at, Number **array, int64_t length) {
    *array = (Number *)*at;
    *at += (length * sizeof(Number) + 63) / 64 * 64;
}

// Lay the arrays out from `at`; returns where they end.
static char *lay_out(Work *work, char *at, bool apart) {
    int64_t eights = work->width / LANES, rows = work->rows * (work->panels ? eights : 1);
    for (int t = Z; t <= A; t++) take(&at, &work->growing[t], work->panels ? eights : 0);
    for (int t = 0; t < TENSORS; t++) {
        take(&at, &work->tile[t], work->panels ? 0 : eights * work->length);
        take(&at, &work->finite[t], work->length);
        take(&at, &work->apart[t], apart ? work->length : 0);
        take(&at, &work->finite_x[t], work->longest);
    }
    take(&at, &work->greatest, LANES * rows);
    take(&at, &work->smallest, LANES * rows);
    take(&at, &work->output, LANES * rows);
    take(&at, &work->least_output, LANES * rows);
    take(&at, &work->match, LANES * rows);
    take(&at, &work->first, work->rows + 1);
    take(&at, &work->finite_first, work->rows + 1);
    take(&at, &work->where, work->longest);
    take(&at, &work->offset, work->longest);
    take(&at, &work->counts, work->panels ? 0 : work->width);
    take(&at, &work->spare, LANES);
    return at;
}

// Counts of a panel's units. A call leaves them as it found them, for folding clears what was counted: the next one takes
// them as they are, because clearing all of them would take longer than counting.
static Counts *kept_counts[16];

static Counts *take_counts() {
    for (Counts *&place : kept_counts)
        if (Counts *counts = __atomic_exchange_n(&place, nullptr, __ATOMIC_ACQUIRE)) return counts;
    Counts *counts = (Counts *)calloc(PANEL_UNITS, sizeof(Counts));
    for (int64_t unit = 0; counts && unit < PANEL_UNITS; unit++) counts[unit].smallest = __builtin_inff();
    return counts;
}

static void keep_counts(Counts *counts) {
    for (Counts *&place : kept_counts) {
        Counts *none = nullptr;
        if (__atomic_compare_exchange_n(&place, &none, counts, false, __ATOMIC_RELEASE, __ATOMIC_RELAXED)) return;
    }
    free(counts);
}

static bool prepare(Work *work, const Task &task) {
    *work = {};
    work->rows = 1;
    for (int64_t i = 0; i < task.runs; i++) {
        int64_t row = task.run_R[i], stop = task.run_R[i + 1], n = task.first_N[stop] - task.first_N[row];
        work->longest = n > work->longest ? n : work->longest;
        work->rows = stop - row > work->rows ? stop - row : work->rows;
    }
    work->panels = has_panels(task, work->longest);
    // more units together only where their numbers are neighbours in memory
    int64_t most = task.stride[Z][2] != 1 ? LANES : work->panels ? PANEL_UNITS : TILE;
    work->width = task.units < most ? (task.units + LANES - 1) / LANES * LANES : most;
    // tiles of a power of two would fall on one another in the cache
    work->length = LANES * work->longest + 16;
    int64_t bytes = lay_out(work, 0, task.groups > 1) - (char *)0;
    char *at = work->memory = (char *)malloc(bytes + 64);
    if (!at) return false;
    lay_out(work, at + 64 - (uintptr_t)at % 64, task.groups > 1);
    if (work->panels) {
        work->counts = take_counts();
        if (!work->counts) free(work->memory);
        return work->counts;
    }
    memset(work->counts, 0, work->width * sizeof(Counts));
    for (int64_t unit = 0; unit < work->width; unit++) work->counts[unit].smallest = __builtin_inff();
    return true;
}

static void release(const Work &work) {
    if (work.panels) keep_counts(work.counts);
    free(work.memory);
}
