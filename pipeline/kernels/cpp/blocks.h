// Adds a block, eight units' presentations of some rows, to what is known of its units.

#pragma once

#include "tiles.h"

static void add_block(const Block &block, const Task &task, Counts *counts, const Work &work);

static Values values_of(const Block &block, const float *value) {
    return {value, block.step, block.first, block.n, block.rows};
}

// Add one unit's presentations without those at which z or a is NaN or infinite.
static void add_finite(Block block, int lane, const Task &task, Counts *counts, const Work &work) {
    int64_t n = 0, mask[LANES] = {};
    const float *from[TENSORS] = {block.z, block.a, block.y};
    const double *from_x[3] = {block.sum, block.length[PEARSON], block.length[COSINE]};
    for (int t = 0; t < TENSORS; t++) memset(work.finite[t], 0, LANES * block.n * sizeof(float));
    for (int64_t r = 0; r < block.rows; r++) {
        work.finite_first[r] = n;
        for (int64_t p = block.first[r]; p < block.first[r + 1]; p++) {
            int64_t at = block.step * p + lane;
            if (!is_finite(block.z[at]) || !is_finite(block.a[at])) continue;
            for (int t = 0; t < TENSORS; t++) work.finite[t][LANES * n + lane] = from[t][at];
            for (int t = 0; t < 3; t++) work.finite_x[t][n] = from_x[t] ? block.input(from_x[t], p, lane) : 0;
            work.where[n++] = p;
        }
    }
    work.finite_first[block.rows] = n;
    task.count_6U[NONFINITE * task.lanes + block.unit + lane] += block.n - n;
    if (n == 0) return;
    mask[lane] = -1;
    block.z = work.finite[Z], block.a = work.finite[A], block.y = work.finite[Y], block.step = LANES;
    block.sum = work.finite_x[0], block.length[PEARSON] = work.finite_x[1], block.length[COSINE] = work.finite_x[2];
    block.first = work.finite_first, block.where = work.where, block.n = n;
    block.active = load<l8>(mask), block.apart = block.ranked = false;
    // the other lanes' counts are no one's
    work.spare[lane] = counts[lane];
    add_block(block, task, work.spare, work);
    counts[lane] = work.spare[lane];
}

// Sum z, and a where it is max(z, 0), anew around the means of the block where they are too far from the centres.
static void add_z_moments(const Block &block, const Task &task, d8 before, d8 centre, Sums sums, const Extent &extent) {
    Values z = values_of(block, block.z);
    Numbers of_z = {task.z_7U + block.unit, task.lanes}, of_a = {task.a_7U + block.unit, task.lanes};
    d8 n = all((double)block.n), rectified_centre = of_a[MEAN], zero = {};
    if (block.rectified) {
        d8 output = sums.rectified.s1 + n * rectified_centre;
        // |z| = 2 max(z, 0) − z
        sums.absolute = all(2.0) * output - (sums.own.s1 + n * centre);
        l8 far = is_far(block.n, sums.rectified.s1, sums.rectified.s2);
        if (lanes_of(far & block.active)) {
            rectified_centre = select(far, rectified_centre + sums.rectified.s1 / n, rectified_centre);
            sums.rectified =
                sweep<true, false>(z, centre, rectified_centre, block.greatest, block.smallest, 0, {}).rectified;
        }
        merge(of_a, block.active, before, block.n, {larger(extent.low, zero), larger(extent.high, zero)},
              rectified_centre, output, sums.rectified);
    }
    l8 far = is_far(block.n, sums.own.s1, sums.own.s2);
    if (lanes_of(far & block.active)) {
        centre = select(far, centre + sums.own.s1 / n, centre);
        sums.own = sweep<false, false>(z, centre, zero, block.greatest, block.smallest, 0, {}).own;
    }
    merge(of_z, block.active, before, block.n, extent, centre, sums.absolute, sums.own);
    if (task.a_is == SAME)
        for (int which = 0; which <= M4; which++) of_a.set(which, block.active, of_z[which]);
}

static void add_a_moments(const Block &block, const Task &task, d8 before, d8 centre, Sums sums) {
    Numbers of_a = {task.a_7U + block.unit, task.lanes};
    Extent extent = extent_of(block.output, block.least_output, block.rows);
    l8 far = is_far(block.n, sums.own.s1, sums.own.s2);
    if (lanes_of(far & block.active)) {
        centre = select(far, centre + sums.own.s1 / all((double)block.n), centre);
        Values a = values_of(block, block.a);
        sums.own = sweep<false, false>(a, centre, d8{}, block.output, block.least_output, 0, {}).own;
    }
    merge(of_a, block.active, before, block.n, extent, centre, sums.absolute, sums.own);
}

template <bool APART>
static void add_block_matches(const Block &block, const Task &task, Counts *counts) {
    Values rows = values_of(block, block.z);
    Inputs x = {block.y, block.z, block.step, block.sum, block.length};
    Pattern<d8> pattern[FORMS];
    Numbers state[FORMS][2];
    int wanted = 0;
    bool known = task.finite_y;
    for (int form = 0; form < FORMS; form++) {
        double *at = task.match_F23U + form * 2 * MATCH_MOMENTS * task.lanes + block.unit;
        state[form][0] = {at, task.lanes}, state[form][1] = {at + MATCH_MOMENTS * task.lanes, task.lanes};
        pattern[form] = {load<d8>(task.bias_U + block.unit), load<d8>(task.mean_U + block.unit),
                         load<d8>(task.scale_U[form] + block.unit)};
        if (!task.forms[form]) continue;
        wanted |= 1 << form;
        known = known && are_defined(x.length[form], block.n * (APART ? LANES : 1), pattern[form].scale);
    }
    if (task.best_match && !(wanted & CORRELATIONS)) {
        MatchSums none[FORMS];
        sweep_matches<APART, CORRELATIONS, RANKED>(rows, x, pattern, 0, 0, block.match, none);
    }
    if (known && wanted == (CORRELATIONS | COSINES)) {
        const int BOTH = CORRELATIONS | COSINES;
        (task.best_match ? add_matches<APART, BOTH, RANKED | KNOWN> : add_matches<APART, BOTH, KNOWN>)(
            rows, x, pattern, block.active, state, counts, block.match);
        return;
    }
    add_forms<APART>(rows, x, pattern, block.active, state, counts, block.match, wanted, task.best_match);
}

// What is kept and summed by class of the block's units.
static Last *last_of(const Block &block, const Task &task) {
    return task.last_TC + block.unit / LANES * (OCTAVE + STRATA);
}

static ByClass by_class(const Block &block, const Task &task, int64_t way) {
    int64_t at = (block.unit / LANES * task.ways + way) * task.classes * LANES;
    return {task.class_n_TJCL + at, task.class_fired_TJCL + at, task.class_mean_TJCL + at, task.class_m2_TJCL + at};
}

// The greatest a of each row, where a has not been read.
static void rectify_rows(const Block &block) {
    for (int64_t i = 0; i < LANES * block.rows; i++)
        block.output[i] = block.rectified && !(block.greatest[i] > 0) ? 0 : block.greatest[i];
}

static void add_rows(const Block &block, const Task &task) {
    if (task.ways && task.a_is != GIVEN) rectify_rows(block);
    for (int64_t way = 0; way < task.ways; way++)
        add_classes(block, task.label_JN + way * task.rows, by_class(block, task, way));
    if (!task.keeps) return;
    const double *bias = task.bias_U + block.unit, *mean = task.mean_U + block.unit,
                 *scale = task.scale_U[PEARSON] + block.unit;
#define UNIT(lane)                                                                                                     \
    {block, task.keeping, lane, {bias[lane], mean[lane], scale[lane]},                                                 \
     {last_of(block, task), task.key_UK + (block.unit + lane) * task.places,                                           \
      task.uid_UK + (block.unit + lane) * task.places, task.position_UK + (block.unit + lane) * task.places,           \
      task.value_UK3 + 3 * (block.unit + lane) * task.places}}
    const Unit units[LANES] = {UNIT(0), UNIT(1), UNIT(2), UNIT(3), UNIT(4), UNIT(5), UNIT(6), UNIT(7)};
#undef UNIT
    keep_rows(block, task.keeping, units);
}

// Ask for what `add_rows` will read of the units, for it has left the caches since the batch before.
static void ask_for_rows(const Block &block, const Task &task, const Extent &extent) {
    if (task.keeps) {
        const Last *last = last_of(block, task);
        int64_t octave[LANES], highest = 0;
        store(octave, octaves_of(extent.high));
        for (int lane = 0; lane < LANES; lane++) highest = octave[lane] > highest ? octave[lane] : highest;
        for (int64_t kind = 0; kind < OCTAVE; kind++) ask_for(last[kind].key), ask_for(last[kind].uid);
        // most rows are in the highest octaves
        for (int64_t at = OCTAVE + highest; at >= OCTAVE && at > OCTAVE + highest - 4; at--)
            ask_for(last[at].key), ask_for(last[at].uid);
    }
    for (int64_t way = 0; way < task.ways; way++) {
        const ByClass sums = by_class(block, task, way);
        for (int64_t r = 0; r < block.rows; r++) {
            int64_t of = LANES * task.label_JN[way * task.rows + block.row + r];
            if (of >= 0) ask_for(sums.n + of), ask_for(sums.fired + of), ask_for(sums.mean + of), ask_for(sums.m2 + of);
        }
    }
}

static void add_counts(const Block &block, const Task &task, Counts *counts, const Extent &extent) {
    int64_t *count = task.count_6U + block.unit, rows = 0;
    l8 fired = {}, active = block.active, one = all((int64_t)1) & active;
    for (int64_t r = 0; r < block.rows; r++) {
        rows += block.first[r] < block.first[r + 1];
        fired += one & (widened(load<f8>(block.greatest + LANES * r)) > d8{});
    }
    store(count + N * task.lanes, load<l8>(count + N * task.lanes) + (all(block.n) & active));
    store(count + ROWS * task.lanes, load<l8>(count + ROWS * task.lanes) + (all(rows) & active));
    store(count + ROWS_FIRED * task.lanes, load<l8>(count + ROWS_FIRED * task.lanes) + fired);
    double largest[LANES];
    store(largest, larger(absolute(extent.low), absolute(extent.high)));
    int lanes = lanes_of(active);
    for (int lane = 0; lane < LANES; lane++) {
        if (!(lanes >> lane & 1)) continue;
        count[ZEROS * task.lanes + lane] += count_zeros(counts + lane, block.z + lane, block.step, block.n);
        if (largest[lane] > counts[lane].largest) counts[lane].largest = largest[lane];
    }
}

// Around what z and a of eight units are summed: their means so far, of new units near that of the block.
struct Centres {
    d8 z, a;
};

static Centres centres_of(const Block &block, const Task &task) {
    const double *mean = task.z_7U + MEAN * task.lanes + block.unit, *a_mean = task.a_7U + MEAN * task.lanes + block.unit;
    Centres centres = {load<d8>(mean), load<d8>(a_mean)};
    l8 known = load<l8>(task.count_6U + N * task.lanes + block.unit) > l8{};
    if (lanes_of(known) == (1 << LANES) - 1) return centres;
    centres.z = select(known, centres.z, near_mean(values_of(block, block.z)));
    if (task.a_is == GIVEN) centres.a = select(known, centres.a, near_mean(values_of(block, block.a)));
    return centres;
}

// What has been summed of a block, with the extremes of its rows, joins what is known of its units.
static void join(const Block &block, const Task &task, const Centres &centres, const Sums &sums, const Sums &a_sums,
                 Counts *counts, const Work &work) {
    int active = lanes_of(block.active);
    if (active & ~lanes_of(is_finite(sums.own.s1) & is_finite(a_sums.own.s1))) {
        for (int64_t p = 0; p < block.n; p++) count_raw<-1>(counts, block.z + block.step * p);
        for (int lane = 0; lane < LANES; lane++)
            if (active >> lane & 1) add_finite(block, lane, task, counts, work);
        return;
    }
    d8 before = widened(load<l8>(task.count_6U + N * task.lanes + block.unit));
    Extent extent = extent_of(block.greatest, block.smallest, block.rows);
    ask_for_rows(block, task, extent);
    add_counts(block, task, counts, extent);
    if (task.moments) {
        add_z_moments(block, task, before, centres.z, sums, extent);
        if (task.a_is == GIVEN) add_a_moments(block, task, before, centres.a, a_sums);
    }
    if (!block.ranked && (task.forms[PEARSON] || task.forms[COSINE] || task.keeps)) {
        if (!task.best_match)
            for (int64_t i = 0; i < LANES * block.rows; i++) block.match[i] = -__builtin_inf();
        if (block.apart)
            add_block_matches<true>(block, task, counts);
        else
            add_block_matches<false>(block, task, counts);
    }
    add_rows(block, task);
}

static void add_block(const Block &block, const Task &task, Counts *counts, const Work &work) {
    const Centres centres = centres_of(block, task);
    auto sweep_z = block.rectified ? sweep<true, true> : sweep<false, true>;
    Sums sums = sweep_z(values_of(block, block.z), centres.z, centres.a, block.greatest, block.smallest, counts,
                        block.ahead[Z]);
    Sums a_sums = {};
    if (task.a_is == GIVEN)
        a_sums = sweep<false, false>(values_of(block, block.a), centres.a, d8{}, block.output, block.least_output, 0,
                                     block.ahead[A]);
    join(block, task, centres, sums, a_sums, counts, work);
}
