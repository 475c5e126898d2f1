# mypy: ignore-errors
"""What is counted by rows on a GPU, in Triton: rows that fire, and per class rows, firing, mean and spread of a.

Layer 1: Triton alone; only to be imported where that is installed. Each program adds a batch to some units and classes
of the state in place, by the pairwise update, rows in their order: the same bits however the programs run.

Shapes: N rows, U units, C classes, P kinds of labels; tiles are (n, c, u).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _cube_n(value_n):
    return tl.expand_dims(tl.expand_dims(value_n, 1), 1)


@triton.jit
def _cube_c(value_c):
    return tl.expand_dims(tl.expand_dims(value_c, 1), 0)


@triton.jit
def _of_rows(at, begin, rows, units, unit_u, BN: tl.constexpr):
    """Of BN rows from `begin` a number of each of the units, (n, 1, u) in float64; −∞ where there is none."""
    n = tl.expand_dims(begin + tl.arange(0, BN), 1)
    inside = (n < rows) & (tl.expand_dims(unit_u, 0) < units)
    value = tl.load(at + n.to(tl.int64) * units + tl.expand_dims(unit_u, 0), mask=inside, other=float("-inf"))
    return tl.expand_dims(value.to(tl.float64), 1)


@triton.jit
def _of_label(label_N, begin, rows, class_c, BN: tl.constexpr):
    n = begin + tl.arange(0, BN)
    return _cube_n(tl.load(label_N + n, mask=n < rows, other=-1)) == _cube_c(class_c)


@triton.jit(do_not_specialize=["rows", "units", "classes"])
def by_row(
    greatest_NU, output_NU, label_PN, rows_2U, n_PUC, fired_PUC, mean_PUC, m2_PUC, rows, units, classes,
    CLASSES: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, BU: tl.constexpr,
):  # fmt: skip
    """Add the rows to those of BU units, and to BC of their classes by one kind of label."""
    unit_u = tl.program_id(0) * BU + tl.arange(0, BU)
    inside_u = unit_u < units
    if (tl.program_id(1) == 0) & (tl.program_id(2) == 0):
        found, fired = tl.zeros([BU], tl.int64), tl.zeros([BU], tl.int64)
        for begin in range(0, rows, BN):
            greatest = _of_rows(greatest_NU, begin, rows, units, unit_u, BN)
            found += tl.sum(tl.sum((greatest > float("-inf")).to(tl.int64), axis=1), axis=0)
            fired += tl.sum(tl.sum((greatest > 0).to(tl.int64), axis=1), axis=0)
        at = rows_2U + unit_u
        tl.store(at, tl.load(at, mask=inside_u, other=0) + found, mask=inside_u)
        tl.store(at + units, tl.load(at + units, mask=inside_u, other=0) + fired, mask=inside_u)
    if CLASSES:
        kind = tl.program_id(2).to(tl.int64)
        class_c = tl.program_id(1) * BC + tl.arange(0, BC)
        label_N = label_PN + kind * rows
        nothing = tl.zeros([BN, BC, BU], tl.float64)
        n, fires, total = nothing.to(tl.int32), nothing.to(tl.int32), nothing
        for begin in range(0, rows, BN):
            member = _of_label(label_N, begin, rows, class_c, BN)
            a = _of_rows(output_NU, begin, rows, units, unit_u, BN)
            greatest = _of_rows(greatest_NU, begin, rows, units, unit_u, BN)
            member_a = member & (a > float("-inf"))
            n += member_a.to(tl.int32)
            fires += (member & (greatest > 0)).to(tl.int32)
            total += tl.where(member_a, a, 0)
        n, fires = tl.sum(n, axis=0).to(tl.int64), tl.sum(fires, axis=0).to(tl.int64)
        mean = tl.sum(total, axis=0) / tl.maximum(n, 1).to(tl.float64)
        m2 = nothing
        for begin in range(0, rows, BN):
            a = _of_rows(output_NU, begin, rows, units, unit_u, BN)
            member = _of_label(label_N, begin, rows, class_c, BN) & (a > float("-inf"))
            rest = tl.where(member, a - tl.expand_dims(mean, 0), 0)
            m2 += rest * rest
        m2 = tl.sum(m2, axis=0)
        unit, label = tl.expand_dims(unit_u.to(tl.int64), 0), tl.expand_dims(class_c, 1)
        at, inside = (kind * units + unit) * classes + label, (unit < units) & (label < classes)
        before = tl.load(n_PUC + at, mask=inside, other=0)
        mean_before = tl.load(mean_PUC + at, mask=inside, other=0)
        both = tl.maximum(before + n, 1).to(tl.float64)
        share, d = n.to(tl.float64) / both, mean - mean_before
        d = tl.where((before > 0) & (n > 0), d, 0)
        apart = d * d * (before.to(tl.float64) * share)
        tl.store(n_PUC + at, before + n, mask=inside)
        tl.store(fired_PUC + at, tl.load(fired_PUC + at, mask=inside, other=0) + fires, mask=inside)
        tl.store(mean_PUC + at, tl.where(before > 0, mean_before + d * share, mean), mask=inside)
        tl.store(m2_PUC + at, tl.load(m2_PUC + at, mask=inside, other=0) + m2 + apart, mask=inside)
