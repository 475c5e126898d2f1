"""Which inputs carry what fires a unit."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from tests.statistics.recompute.raw import Array, Unit, kept_inputs, near

TOP = 8


def check_composition(one: Unit, edges: pd.DataFrame | None) -> None:
    if not one.raw.fires:
        one.null("composition_total")
        return
    x, _, fired = kept_inputs(one)
    if not fired.any():
        one.close("composition_total", math.nan, 0)
        return
    rise = x[fired].mean(0) - x.mean(0)
    terms = one.w * rise
    size = np.abs(one.w * x).sum(1).max() + abs(one.b)
    one.close("composition_total", terms.sum(), 1e-5 * size)
    # the law: what all contributions add up to is the rise of the model's own z
    near(
        terms.sum(), one.z[fired_of(one)].mean() - one.z[finite_of(one)].mean(), 1e-4 * size, "the sum of contributions"
    )
    numbers = np.array([one.raw.contributors(one.unit, d) for d in range(len(one.w))])
    sums = {int(number): terms[numbers == number].sum() for number in np.unique(numbers)}
    assert edges is not None
    own = edges[edges["unit"] == one.unit].sort_values("rank")
    if fired.all():
        assert len(own) == 0
        return
    assert own["rank"].tolist() == list(range(min(TOP, len(sums))))
    order = sorted(map(abs, sums.values()), reverse=True)
    for place, row in enumerate(own.to_dict("records")):
        near(row["contribution"], sums[row["input"]], 1e-5 * size, "edges.contribution")
        assert abs(sums[row["input"]]) >= order[place] - 1e-5 * size
        near(
            row["share"], row["contribution"] / one.row["composition_total"], 1e-9 * max(1, abs(row["share"])), "share"
        )


def finite_of(one: Unit) -> Array:
    return np.isfinite(one.x).all(1)


def fired_of(one: Unit) -> Array:
    return finite_of(one) & one.fired
