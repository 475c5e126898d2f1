// The fused kernel: everything that a site's statistics need of one batch, unit by unit, in runs of whole rows.
//
// z, a and y are read where they are, by their strides. A run that is contiguous in memory is used in place; others are
// gathered, of neighbouring units together where units are neighbours in memory. A run stays in the first cache, so each
// pass over it does one thing. What is grown is every unit's own: units may be shared out among threads.

#include <stdlib.h>

#include "bins.h"
#include "rows.h"
#include "sums.h"

// what Task.a_is says: a is z, max(z, 0), or given
enum { SAME, RECTIFIED, GIVEN };
enum { FLOAT32, BFLOAT16, FLOAT16 };
enum { Z, A, Y, TENSORS };
enum { N, NONFINITE, ZEROS, FIRED, ROWS, ROWS_FIRED, COUNTED };
enum { PEARSON, COSINE, FORMS };
// units gathered together: of float32 a cache line of 64 bytes
static const int TILE = 32;
// presentations by which memory is asked for before it is read
static const int AHEAD = 16;

// As native_task.py declares it; shapes by suffix as in the Python: P presentations, U units, G groups, N rows, B bins,
// C classes, J ways to label, K places of kept rows.
struct Task {
    // what is shown: memory, type and strides (entry, position, unit) of z, a and y
    const void *memory[TENSORS];
    int64_t type[TENSORS], stride[TENSORS][3];
    // first presentation of each row, first row of each run; where presentations are, null if row is entry
    const int64_t *first_N, *run_R, *entry_P, *index_P;
    int64_t runs, presentations, units, groups;
    const double *sum_GP, *length_GP[FORMS];
    const double *bias_U, *mean_U, *scale_U[FORMS];
    // what is wanted
    int64_t a_is, moments, bins, forms[FORMS], best_match, keeps, ways, classes, rows;
    Keeping keeping;
    const int64_t *label_JN;
    // what is grown
    int64_t *count_U6;
    Moments *z_U, *a_U;
    int64_t *top_U, *bin_UB, *undefined_FU, *match_FUB;
    MatchMoments *match_FU2;
    int64_t *class_n_JUC, *class_fired_JUC;
    double *class_mean_JUC, *class_m2_JUC;
    int64_t places, *kept_count_UC, *key_UK, *uid_UK, *position_UK;
    double *value_UK3;
};

// One unit's counts of the batch, folded into its bins at the end.
struct Counts {
    Raw z;
    uint32_t match[FORMS][2 * MATCH_BINS + 1];
};

// Memory of one call; the longest run has `longest` presentations, `rows` is the most rows of one, `length` a line's.
struct Work {
    int64_t longest, rows, width, length;
    float *tensor[TENSORS], *finite[TENSORS];
    double *finite_x[3], *match, *row_4R;
    int64_t *first, *finite_first, *where, *offset;
    Counts *counts;
    char *memory;
};

static int64_t padded(int64_t bytes) { return (bytes + 63) / 64 * 64; }

template <class Number>
static void take(char **memory, Number **array, int64_t length) {
    *array = (Number *)*memory;
    *memory += padded(length * sizeof(Number));
}

static bool prepare(Work *work, const Task &task, int64_t width) {
    work->longest = work->rows = 1, work->width = width;
    for (int64_t i = 0; i < task.runs; i++) {
        int64_t row = task.run_R[i], stop = task.run_R[i + 1], n = task.first_N[stop] - task.first_N[row];
        work->longest = n > work->longest ? n : work->longest;
        work->rows = stop - row > work->rows ? stop - row : work->rows;
    }
    int64_t longest = work->longest, rows = work->rows + 1;
    // lines of a power of two would fall on one another in the cache
    work->length = padded(longest * 4) / 4 + 16;
    int64_t lines = TENSORS * (width + 1) * padded(work->length * 4) + 6 * padded(longest * 8);
    int64_t bytes = lines + padded(4 * rows * 8) + 2 * padded(rows * 8) + padded(width * sizeof(Counts)) + 64;
    char *at = work->memory = (char *)malloc(bytes);
    if (!at) return false;
    at += 64 - (uintptr_t)at % 64;
    for (int t = 0; t < TENSORS; t++) {
        take(&at, &work->tensor[t], width * work->length);
        take(&at, &work->finite[t], longest);
    }
    for (int t = 0; t < 3; t++) take(&at, &work->finite_x[t], longest);
    take(&at, &work->match, longest);
    take(&at, &work->where, longest);
    take(&at, &work->offset, longest);
    take(&at, &work->row_4R, 4 * rows);
    take(&at, &work->first, rows);
    take(&at, &work->finite_first, rows);
    take(&at, &work->counts, width);
    memset(work->counts, 0, width * sizeof(Counts));
    for (int64_t unit = 0; unit < width; unit++) work->counts[unit].z.first = RAW_SIDE - 1;
    return true;
}

// A run of rows: presentations start … start + n − 1.
struct Rows {
    int64_t row, rows, start, n;
};

// Where the presentations of a run are, for the first unit.
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

// Copy a run of the units first … first + width − 1 to one line each.
template <class Number>
static void gather(const Task &task, const Number *memory, const int64_t *stride, const Rows &rows, int64_t first,
                   int64_t width, int64_t *offset, float *line, int64_t length) {
    memory += first * stride[2];
    if (!task.entry_P && stride[1] == 1) {
        int64_t positions = task.first_N[1];
        for (int64_t unit = 0; unit < width; unit++)
            for (int64_t r = 0; r < rows.rows; r++) {
                const Number *from = memory + (rows.row + r) * stride[0] + unit * stride[2];
                float *to = line + unit * length + r * positions;
                for (int64_t s = 0; s < positions; s++) to[s] = from[s];
            }
        return;
    }
    locate(task, stride, rows, offset);
    int64_t p = 0;
    if (sizeof(Number) == sizeof(float) && stride[2] == 1)
        for (; p + 8 <= rows.n; p += 8) {
            // the strides are too large for the processor to see them coming
            if (p + 8 + AHEAD <= rows.n)
                for (int i = 0; i < 8; i++) __builtin_prefetch(memory + offset[p + AHEAD + i]);
            int64_t unit = 0;
            for (; unit + 8 <= width; unit += 8) {
                f8 block[8];
                for (int i = 0; i < 8; i++) block[i] = load<f8>((const float *)memory + offset[p + i] + unit);
                transpose(block);
                for (int i = 0; i < 8; i++) store(line + (unit + i) * length + p, block[i]);
            }
            for (; unit < width; unit++)
                for (int i = 0; i < 8; i++) line[unit * length + p + i] = memory[offset[p + i] + unit];
        }
    for (; p < rows.n; p++)
        for (int64_t unit = 0; unit < width; unit++)
            line[unit * length + p] = memory[offset[p] + unit * stride[2]];
}

// The lines of some units' z, a or y: where they are if they are contiguous there, else gathered.
static const float *lines_of(const Task &task, int tensor, const Rows &rows, int64_t first, int64_t width, Work *work,
                             int64_t *step) {
    const int64_t *stride = task.stride[tensor];
    const void *memory = task.memory[tensor];
    if (task.type[tensor] == FLOAT32 && !task.entry_P && rows.rows == 1 && stride[1] == 1) {
        *step = stride[2];
        return (const float *)memory + rows.row * stride[0] + first * stride[2];
    }
    int64_t length = *step = work->length;
    float *line = work->tensor[tensor];
    switch (task.type[tensor]) {
        case FLOAT32: gather(task, (const float *)memory, stride, rows, first, width, work->offset, line, length); break;
        case BFLOAT16: gather(task, (const BFloat16 *)memory, stride, rows, first, width, work->offset, line, length); break;
        case FLOAT16: gather(task, (const Float16 *)memory, stride, rows, first, width, work->offset, line, length); break;
    }
    return line;
}

// Leave out the presentations at which z or a is NaN or infinite.
static void keep_finite(Run *run, const Task &task, Work *work) {
    int64_t n = 0;
    const float *from[TENSORS] = {run->z, run->a, run->y};
    const double *from_x[3] = {run->sum, run->pearson, run->cosine};
    for (int64_t r = 0; r < run->rows; r++) {
        work->finite_first[r] = n;
        for (int64_t p = run->first[r]; p < run->first[r + 1]; p++) {
            if (!is_finite(run->z[p]) || !is_finite(run->a[p])) continue;
            for (int t = 0; t < TENSORS; t++) work->finite[t][n] = from[t][p];
            for (int t = 0; t < 3; t++) work->finite_x[t][n] = from_x[t] ? from_x[t][p] : 0;
            work->where[n++] = p;
        }
    }
    work->finite_first[run->rows] = n;
    run->z = work->finite[Z], run->a = work->finite[A], run->y = work->finite[Y];
    run->sum = work->finite_x[0], run->pearson = work->finite_x[1], run->cosine = work->finite_x[2];
    run->first = work->finite_first, run->where = work->where, run->n = n;
}

static void add_matches(const Run &run, const Task &task, int64_t unit, Work *work, Counts *counts) {
    double *match = work->match;
    Pattern pattern = {task.bias_U[unit], task.mean_U[unit], task.scale_U[COSINE][unit]};
    for (int form = COSINE; form >= PEARSON; form--) {
        if (form == COSINE && !task.forms[COSINE]) continue;
        if (form == PEARSON && !task.forms[PEARSON] && !task.best_match) break;
        pattern.scale = task.scale_U[form][unit];
        if (form == COSINE)
            matches<false>(run.y, run.sum, run.cosine, run.n, pattern, match);
        else
            matches<true>(run.y, run.sum, run.pearson, run.n, pattern, match);
        if (task.forms[form])
            add_matches(match, run.z, run.n, counts->match[form], task.match_FU2 + (form * task.units + unit) * 2);
    }
    if (!task.best_match) {
        for (int64_t r = 0; r < run.rows; r++) run.match[r] = -__builtin_inf();
        return;
    }
    // NaN, where undefined, is never greater
    extreme_by_row<1, double, d4>(match, run, run.match);
}

static void add_rows(const Run &run, const Task &task, int64_t unit) {
    extreme_by_row<1, float, f8>(run.z, run, run.greatest);
    int64_t *count = task.count_U6 + unit * COUNTED;
    for (int64_t r = 0; r < run.rows; r++) {
        count[ROWS] += run.first[r] < run.first[r + 1];
        count[ROWS_FIRED] += run.greatest[r] > 0;
    }
    if (task.ways) {
        if (task.a_is == GIVEN)
            extreme_by_row<1, float, f8>(run.a, run, run.output);
        else
            for (int64_t r = 0; r < run.rows; r++)
                run.output[r] = run.rectified && !(run.greatest[r] > 0) ? 0 : run.greatest[r];
        for (int64_t way = 0; way < task.ways; way++) {
            int64_t at = (way * task.units + unit) * task.classes;
            ByClass sums = {task.class_n_JUC + at, task.class_fired_JUC + at, task.class_mean_JUC + at,
                            task.class_m2_JUC + at};
            add_classes(run, task.label_JN + way * task.rows, sums);
        }
    }
    if (task.keeps) {
        extreme_by_row<-1, float, f8>(run.z, run, run.smallest);
        int64_t at = unit * task.places;
        Kept kept = {task.kept_count_UC + unit * COUNTS, task.key_UK + at, task.uid_UK + at, task.position_UK + at,
                     task.value_UK3 + 3 * at};
        Pattern pattern = {task.bias_U[unit], task.mean_U[unit], task.scale_U[PEARSON][unit]};
        keep_rows(run, task.keeping, pattern, kept, unit);
    }
}

static void add_unit(Run run, const Task &task, int64_t unit, Work *work, Counts *counts) {
    int64_t *count = task.count_U6 + unit * COUNTED, n_before = count[N];
    Moments *z_state = task.z_U + unit, *a_state = task.a_U + unit;
    double centre = n_before ? z_state->mean : near_mean(run.z, run.n), a_centre = 0;
    PowerSums sums = power_sums<false>(run.z, run.n, centre), a_sums = {};
    if (task.a_is == GIVEN) {
        a_centre = n_before ? a_state->mean : near_mean(run.a, run.n);
        a_sums = power_sums<false>(run.a, run.n, a_centre);
    }
    if (!is_finite(sums.absolute) || !is_finite(a_sums.absolute)) {
        int64_t shown = run.n;
        keep_finite(&run, task, work);
        count[NONFINITE] += shown - run.n;
        if (run.n == 0) return;
        centre = near_mean(run.z, run.n), a_centre = near_mean(run.a, run.n);
        sums = power_sums<false>(run.z, run.n, centre);
        if (task.a_is == GIVEN) a_sums = power_sums<false>(run.a, run.n, a_centre);
    }
    Extent z = extent_of(run.z, run.n);
    count[N] += run.n, count[ZEROS] += z.zero, count[FIRED] += z.fired;
    if (task.moments) {
        add_moments<false>(z_state, n_before, run.z, run.n, z.low, z.high, centre, sums);
        if (task.a_is == SAME) {
            *a_state = *z_state;
        } else if (task.a_is == RECTIFIED) {
            a_centre = n_before ? a_state->mean : 0;
            a_sums = power_sums<true>(run.z, run.n, a_centre);
            double low = z.low > 0 ? z.low : 0, high = z.high > 0 ? z.high : 0;
            add_moments<true>(a_state, n_before, run.z, run.n, low, high, a_centre, a_sums);
        } else {
            Extent a = extent_of(run.a, run.n);
            add_moments<false>(a_state, n_before, run.a, run.n, a.low, a.high, a_centre, a_sums);
        }
    }
    if (task.bins) {
        count_raw(&counts->z, run.z, run.n);
        float below = z.low < 0 ? -z.low : 0, above = z.high > 0 ? z.high : 0;
        widen(&counts->z, z.least, larger(below, above), z.zero, run.z, run.n);
    }
    if (task.forms[PEARSON] || task.forms[COSINE] || task.keeps) add_matches(run, task, unit, work, counts);
    add_rows(run, task, unit);
}

static void add_run(const Task &task, int64_t index, int64_t first, int64_t width, Work *work) {
    Rows rows = {task.run_R[index], task.run_R[index + 1] - task.run_R[index], 0, 0};
    rows.start = task.first_N[rows.row];
    rows.n = task.first_N[rows.row + rows.rows] - rows.start;
    if (rows.n == 0) return;
    for (int64_t r = 0; r <= rows.rows; r++) work->first[r] = task.first_N[rows.row + r] - rows.start;
    const float *line[TENSORS];
    int64_t step[TENSORS];
    line[Z] = line[A] = line[Y] = lines_of(task, Z, rows, first, width, work, &step[Z]);
    step[A] = step[Y] = step[Z];
    if (task.a_is == GIVEN) line[A] = lines_of(task, A, rows, first, width, work, &step[A]);
    if (task.memory[Y]) line[Y] = lines_of(task, Y, rows, first, width, work, &step[Y]);
    int64_t at = first / (task.units / task.groups) * task.presentations + rows.start;
    Run run = {};
    run.n = rows.n, run.rows = rows.rows, run.row = rows.row, run.start = rows.start, run.first = work->first;
    run.rectified = task.a_is == RECTIFIED;
    if (task.sum_GP) run.sum = task.sum_GP + at, run.pearson = task.length_GP[PEARSON] + at, run.cosine = task.length_GP[COSINE] + at;
    run.greatest = work->row_4R, run.smallest = run.greatest + work->rows;
    run.output = run.smallest + work->rows, run.match = run.output + work->rows;
    for (int64_t unit = 0; unit < width; unit++) {
        run.z = line[Z] + unit * step[Z], run.a = line[A] + unit * step[A], run.y = line[Y] + unit * step[Y];
        add_unit(run, task, first + unit, work, work->counts + unit);
    }
}

static void fold_counts(const Task &task, int64_t unit, Counts *counts) {
    if (task.bins) fold(&counts->z, task.top_U + unit, task.bin_UB + unit * BINS);
    for (int form = 0; form < FORMS; form++) {
        int64_t at = form * task.units + unit;
        if (task.forms[form])
            fold_matches(counts->match[form], task.match_FUB + at * 2 * MATCH_BINS, task.undefined_FU + at);
    }
}

extern "C" int task_bytes() { return sizeof(Task); }

// The first row of each run of whole rows with about `length` presentations, and the number of rows; returns the runs.
extern "C" int64_t cut(const int64_t *first_N, int64_t rows, int64_t length, int64_t *run_R) {
    int64_t runs = 0;
    run_R[0] = 0;
    for (int64_t row = 1; row < rows; row++)
        if (first_N[row + 1] - first_N[run_R[runs]] > length) run_R[++runs] = row;
    run_R[++runs] = rows;
    return runs;
}

// Add a batch to what is known of the units begin … end − 1; 0, or −1 if there is no memory.
extern "C" int observe(const Task *task, int64_t begin, int64_t end) {
    Work work;
    int64_t per_group = task->units / task->groups;
    if (!prepare(&work, *task, per_group < TILE ? per_group : TILE)) return -1;
    for (int64_t first = begin; first < end;) {
        int64_t last = (first / per_group + 1) * per_group;
        if (last > end) last = end;
        if (last > first + work.width) last = first + work.width;
        for (int64_t index = 0; index < task->runs; index++) add_run(*task, index, first, last - first, &work);
        for (int64_t unit = first; unit < last; unit++) fold_counts(*task, unit, work.counts + unit - first);
        first = last;
    }
    free(work.memory);
    return 0;
}

template <class Number>
static void sum_vectors(const Number *x, int64_t vectors, int64_t step, int64_t n, double *sums_3V) {
    for (int64_t v = 0; v < vectors; v++)
        sum_vector(x + v * step, n, sums_3V + v, sums_3V + vectors + v, sums_3V + 2 * vectors + v);
}

// Σx, Σx² and Σ(x − x̄)² of vectors of n inputs, `step` apart.
extern "C" void vector_sums(const void *x, int64_t type, int64_t vectors, int64_t step, int64_t n, double *sums_3V) {
    switch (type) {
        case FLOAT32: sum_vectors((const float *)x, vectors, step, n, sums_3V); break;
        case BFLOAT16: sum_vectors((const BFloat16 *)x, vectors, step, n, sums_3V); break;
        case FLOAT16: sum_vectors((const Float16 *)x, vectors, step, n, sums_3V); break;
    }
}

// Adds to each group how many presentations have a finite ‖x‖, and the sum of it.
extern "C" void norms(const double *square, int64_t groups, int64_t presentations, int64_t *n_G, double *norm_G) {
    for (int64_t group = 0; group < groups; group++) {
        double all = 0;
        int64_t finite = 0;
        for (int64_t p = 0; p < presentations; p++, square++) {
            bool known = is_finite(*square);
            all += known ? __builtin_sqrt(*square) : 0, finite += known;
        }
        n_G[group] += finite, norm_G[group] += all;
    }
}

// The same of a convolution's windows; 0, or −1 if there is no memory.
extern "C" int window_sums(const Windows *windows) {
    switch (windows->type) {
        case FLOAT32: return sum_windows<float>(*windows);
        case BFLOAT16: return sum_windows<BFloat16>(*windows);
        default: return sum_windows<Float16>(*windows);
    }
}
