// The fused kernel: everything that a site's statistics need of one batch, eight units at a time, in runs of whole rows.
//
// A run of eight units is copied to a tile; each pass over it does one thing, or several that keep different parts of the
// processor busy. Every lane adds up in the order of the presentations, whatever the layout in memory. What is grown is
// every unit's own: units may be shared out among threads.

#include "deviations.h"
#include "panels.h"
#include "sums.h"
#include "tiled.h"

// Units of several groups see different inputs: lay those of eight units side by side.
static void lay_apart(const Task &task, const double *x_GP, const Rows &rows, int64_t unit, double *apart) {
    int64_t per_group = task.units / task.groups;
    for (int lane = 0; lane < LANES; lane++) {
        int64_t at = unit + lane < task.units ? unit + lane : task.units - 1;
        const double *x = x_GP + at / per_group * task.presentations + rows.start;
        for (int64_t p = 0; p < rows.n; p++) apart[LANES * p + lane] = x[p];
    }
}

static void find_inputs(Block *block, const Task &task, const Rows &rows, const Work &work) {
    if (!task.sum_GP) return;
    int64_t per_group = task.units / task.groups, last = block->unit + LANES - 1;
    last = last < task.units ? last : task.units - 1;
    const double *x_GP[3] = {task.sum_GP, task.length_GP[PEARSON], task.length_GP[COSINE]};
    const double **x[3] = {&block->sum, &block->length[PEARSON], &block->length[COSINE]};
    block->apart = block->unit / per_group != last / per_group;
    for (int which = 0; which < 3; which++) {
        *x[which] = x_GP[which] + block->unit / per_group * task.presentations + rows.start;
        if (!block->apart) continue;
        lay_apart(task, x_GP[which], rows, block->unit, work.apart[which]);
        *x[which] = work.apart[which];
    }
}

// The memory of a tensor's tile for run `index` of the units from `unit` on, as sweeps ask for it.
static Ahead ahead_of(const Task &task, int tensor, int64_t index, int64_t unit) {
    const int64_t *stride = task.stride[tensor], size = task.type[tensor] == FLOAT32 ? 4 : 2;
    if (task.entry_P || stride[1] != 1 || stride[2] == 1) return {};
    const char *at = (const char *)task.memory[tensor] + (task.run_R[index] * stride[0] + unit * stride[2]) * size;
    return {at, stride[0] * size, LANES * size};
}

// Add a run that is read in panels; `block` has its rows.
static void add_panels(const Task &task, Block block, const Rows &rows, int64_t first, int64_t units, const Work &work) {
    const int64_t *stride = task.stride[Z], begin = rows.row * stride[0] + first, step = LANES * work.rows;
    const float *z = (const float *)task.memory[Z] + begin;
    const float *a = task.a_is == GIVEN ? (const float *)task.memory[A] + begin : z;
    const f8 infinite = f8{} + __builtin_inff();
    block.active = all((int64_t)-1), block.step = stride[1], block.ranked = task.best_match;
    for (int64_t eight = 0; eight < units / LANES; eight++) {
        block.unit = first + LANES * eight, block.z = z + LANES * eight, block.a = a + LANES * eight;
        const Centres centres = centres_of(block, task);
        work.growing[Z][eight] = {Sums{}, centres.z, centres.a, infinite};
        work.growing[A][eight] = {Sums{}, centres.a, d8{}, infinite};
    }
    sweep_panels(task, rows, first, units, work);
    for (int64_t eight = 0; eight < units / LANES; eight++) {
        const Growing &of_z = work.growing[Z][eight], &of_a = work.growing[A][eight];
        block.unit = first + LANES * eight, block.a = a + LANES * eight, block.z = block.y = z + LANES * eight;
        block.greatest = work.greatest + eight * step, block.smallest = work.smallest + eight * step;
        block.output = work.output + eight * step, block.least_output = work.least_output + eight * step;
        block.match = work.match + eight * step;
        find_inputs(&block, task, rows, work);
        Counts *counts = work.counts + LANES * eight;
        lower(counts, of_z.least);
        // as a tile's, which are added to what complete segments have
        Sums sums = {}, a_sums = {};
        sums.add(of_z.sums), a_sums.add(of_a.sums);
        join(block, task, {of_z.centre, of_z.rectified_centre}, sums, a_sums, counts, work);
    }
}

static void add_run(const Task &task, int64_t index, int64_t first, int64_t units, const Work &work) {
    Rows rows = {task.run_R[index], task.run_R[index + 1] - task.run_R[index], 0, 0};
    rows.start = task.first_N[rows.row];
    rows.n = task.first_N[rows.row + rows.rows] - rows.start;
    if (rows.n == 0) return;
    for (int64_t r = 0; r <= rows.rows; r++) work.first[r] = task.first_N[rows.row + r] - rows.start;
    Block block = {};
    block.n = rows.n, block.rows = rows.rows, block.row = rows.row, block.start = rows.start, block.first = work.first;
    block.rectified = task.a_is == RECTIFIED;
    block.greatest = work.greatest, block.smallest = work.smallest, block.match = work.match;
    block.output = work.output, block.least_output = work.least_output;
    if (work.panels) return add_panels(task, block, rows, first, units, work);
    const bool given[TENSORS] = {true, task.a_is == GIVEN, task.memory[Y] != 0};
    for (int t = 0; t < TENSORS; t++)
        if (given[t]) fill_tiles(task, t, rows, first, units, work);
    block.step = LANES;
    for (int64_t unit = 0; unit < units; unit += LANES) {
        int64_t tile = unit / LANES * work.length, mask[LANES];
        for (int lane = 0; lane < LANES; lane++) mask[lane] = unit + lane < units ? -1 : 0;
        block.active = load<l8>(mask), block.unit = first + unit;
        bool last = index + 1 == task.runs;
        for (int t = Z; t <= A; t++)
            block.ahead[t] = given[t] ? ahead_of(task, t, last ? 0 : index + 1, block.unit + (last ? work.width : 0)) : Ahead{};
        block.z = work.tile[Z] + tile;
        block.a = given[A] ? work.tile[A] + tile : block.z, block.y = given[Y] ? work.tile[Y] + tile : block.z;
        find_inputs(&block, task, rows, work);
        add_block(block, task, work.counts + unit, work);
    }
}

static void fold_counts(const Task &task, int64_t unit, Counts *counts) {
    task.count_6U[FIRED * task.lanes + unit] += fold(counts, task.top_U + unit, task.bins ? task.bin_UB + unit * BINS : 0);
    for (int form = 0; form < FORMS; form++) {
        int64_t at = form * task.lanes + unit;
        if (task.forms[form])
            fold_matches(counts->match[form], task.match_FU2B + at * 2 * MATCH_BINS, task.undefined_FU + at);
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

// Add a batch to what is known of the units begin … end − 1, `begin` a multiple of eight; 0, or −1 if there is no memory.
extern "C" int observe(const Task *task, int64_t begin, int64_t end) {
    Work work;
    if (!prepare(&work, *task)) return -1;
    for (int64_t first = begin; first < end; first += work.width) {
        int64_t units = first + work.width < end ? work.width : end - first;
        for (int64_t index = 0; index < task->runs; index++) add_run(*task, index, first, units, work);
        for (int64_t unit = 0; unit < units; unit++) fold_counts(*task, first + unit, work.counts + unit);
        // lanes beyond the last unit have been counted too
        for (int64_t unit = units; unit % LANES; unit++) fold(work.counts + unit, 0, 0);
    }
    release(work);
    return 0;
}

template <class Number>
static void sum_vectors(const Number *x, int64_t vectors, int64_t step, int64_t n, double *sums_3V) {
    for (int64_t v = 0; v < vectors; v++)
        sum_vector(Given<Number>{x + v * step}, n, sums_3V + v, sums_3V + vectors + v, sums_3V + 2 * vectors + v);
}

// Σx, Σx² and Σ(x − x̄)² of vectors of n inputs, `step` apart.
extern "C" void vector_sums(const void *x, int64_t type, int64_t vectors, int64_t step, int64_t n, double *sums_3V) {
    switch (type) {
        case FLOAT32: sum_vectors((const float *)x, vectors, step, n, sums_3V); break;
        case BFLOAT16: sum_vectors((const BFloat16 *)x, vectors, step, n, sums_3V); break;
        case FLOAT16: sum_vectors((const Float16 *)x, vectors, step, n, sums_3V); break;
    }
}

// The same of what a layer norm without gain makes of vectors that lie one behind the other, of its mean and 1/std.
extern "C" void norm_sums(const float *x, const float *mean_V, const float *scale_V, int64_t vectors, int64_t n,
                          double *sums_3V) {
    for (int64_t v = 0; v < vectors; v++)
        sum_vector(Normalised{x + v * n, mean_V[v], scale_V[v]}, n, sums_3V + v, sums_3V + vectors + v,
                   sums_3V + 2 * vectors + v);
}

// 1/‖x − x̄‖ and 1/‖x‖ in place of the roots of Σ(x − x̄)² and Σx². NaN where Σx² is not finite or 0, or Σ(x − x̄)² at most
// `constant` of it (kernels/match.py).
extern "C" void invert(const double *square, const double *spread, double *pearson, double *cosine, int64_t n,
                       double constant) {
    for (int64_t p = 0; p < n; p++) {
        bool finite = is_finite(square[p]);
        double of_spread = 1 / pearson[p], of_square = 1 / cosine[p];
        pearson[p] = finite & (spread[p] > constant * square[p]) ? of_spread : __builtin_nan("");
        cosine[p] = finite & (square[p] > 0) ? of_square : __builtin_nan("");
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

extern "C" int slice_bytes() { return sizeof(Slice); }

// See deviations.h.
extern "C" int deviations(const Slice *slice) { return deviate(*slice); }

// See tiled.h.
extern "C" int tiles_bytes() {
    return sizeof(LeftTiles) + sizeof(RightTiles) + sizeof(TileTaps) + sizeof(TileProducts);
}
extern "C" int tiles() { return has_tiles(); }
extern "C" int64_t tile_step_bytes(int64_t n, int64_t pieces) { return step_bytes(n, pieces); }
extern "C" int left_tiles(const LeftTiles *left) { return lay_left(*left); }
extern "C" int right_tiles(const RightTiles *right) { return lay_right(*right); }
extern "C" void tile_taps(const TileTaps *taps) { add_taps(*taps); }
extern "C" void tile_products(const TileProducts *products) {
    if (products->pieces == 1)
        multiply_tiles<1>(*products);
    else
        multiply_tiles<3>(*products);
}
