// Panels: a few presentations of many units, read where the model has put them, line after line.
//
// Where a presentation is a run of units, tiles of some units are copied a piece of a presentation at a time, which memory
// gives at half its speed, and nothing is summed meanwhile. A panel is read in order, and the next one is asked for while
// it is summed: the sums of eight units are taken up and put down again once a panel, and have the same terms in the same
// order as those of a tile.

#pragma once

#include "blocks.h"

// n presentations of a row, `step` numbers apart, of `eights` times eight units; whether the row begins or ends with them.
struct Panel {
    const float *at;
    int64_t step, n, eights;
    bool begins, ends;
};

// The extremes of a row to eight units, and its best match, `step` numbers on to those of the next eight units.
struct Extremes {
    float *greatest, *smallest;
    double *match;
    int64_t step;
};

// What each row's best match is found of: presentations' Σx and 1/‖x − x̄‖, units' patterns.
struct Ranking {
    const double *sum, *length, *bias_U, *mean_U, *scale_U;
};

template <bool RECTIFIED, bool COUNTED, bool RANKED>
static void sweep_panel(const Panel &panel, Growing *growing, Extremes row, Ranking x, Counts *counts) {
    // where the next panel's values are, from those of this one
    const d8 none = all(-__builtin_inf());
    const int64_t ahead = panel.n * panel.step;
    const float *at = panel.at;
    for (int64_t eight = 0; eight < panel.eights; eight++, growing++, at += LANES) {
        Sweep<RECTIFIED, COUNTED> sweep = {growing->sums};
        d8 best = none;
        Pattern<d8> pattern;
        if (RANKED) pattern = {load<d8>(x.bias_U), load<d8>(x.mean_U), load<d8>(x.scale_U)};
        if (panel.begins) {
            sweep.begin_row();
        } else {
            sweep.high = load<f8>(row.greatest), sweep.low = load<f8>(row.smallest);
            if (RANKED) best = load<d8>(row.match);
        }
        sweep.least = growing->least;
        const float *value = at;
        for (int64_t p = 0; p < panel.n; p++, value += panel.step) {
            ask_for(value + ahead);
            sweep.add(value, growing->centre, growing->rectified_centre, counts);
            // NaN, where undefined, is never greater
            if (RANKED)
                best = larger(match_of<true>(widened(load<f8>(value)), all(x.sum[p]), all(x.length[p]), pattern), best);
        }
        growing->sums = sweep.sums, growing->least = sweep.least;
        store(row.greatest, sweep.high), store(row.smallest, sweep.low);
        if (RANKED) {
            store(row.match, panel.ends ? select(best > none, clamped(best), none) : best);
            row.match += row.step, x.bias_U += LANES, x.mean_U += LANES, x.scale_U += LANES;
        }
        row.greatest += row.step, row.smallest += row.step, counts += LANES;
    }
}

// Sum a run of the units first … first + units − 1; the centres of what is growing have been set.
static void sweep_panels(const Task &task, const Rows &rows, int64_t first, int64_t units, const Work &work) {
    const int64_t positions = task.first_N[1], *stride = task.stride[Z], step = LANES * work.rows, eights = units / LANES;
    const bool rectified = task.a_is == RECTIFIED;
    auto sweep_z = task.best_match ? (rectified ? sweep_panel<true, true, true> : sweep_panel<false, true, true>)
                                   : (rectified ? sweep_panel<true, true, false> : sweep_panel<false, true, false>);
    for (int64_t r = 0; r < rows.rows; r++) {
        int64_t row = LANES * r, begin = (rows.row + r) * stride[0] + first;
        for (int64_t s = 0; s < positions; s += PANEL) {
            int64_t n = positions - s < PANEL ? positions - s : PANEL, p = rows.start + r * positions + s;
            const float *z = (const float *)task.memory[Z], *a = (const float *)task.memory[A];
            Panel panel = {z + begin + s * stride[1], stride[1], n, eights, s == 0, s + n == positions};
            Ranking x = {};
            if (task.best_match)
                x = {task.sum_GP + p, task.length_GP[PEARSON] + p, task.bias_U + first, task.mean_U + first,
                     task.scale_U[PEARSON] + first};
            Extremes of_z = {work.greatest + row, work.smallest + row, work.match + row, step};
            sweep_z(panel, work.growing[Z], of_z, x, work.counts);
            if (task.a_is != GIVEN) continue;
            panel.at = a + begin + s * stride[1];
            sweep_panel<false, false, false>(panel, work.growing[A], {work.output + row, work.least_output + row, 0, step},
                                             {}, 0);
        }
    }
}
