"""The patterns by themselves, beside each other and beside their untrained twins."""

from __future__ import annotations

import math

import numpy as np

from tests.statistics.recompute.raw import Unit, cos


def check_weights(one: Unit) -> None:
    raw, w = one.raw, one.w
    mean, std = w.mean(), w.std()
    flat = w.min() == w.max()
    one.relative("weight_norm", np.linalg.norm(w))
    one.close("bias", one.b, 1e-9 * max(1, abs(one.b)))
    one.close("weight_mean", mean, 1e-12)
    one.relative("weight_std", 0.0 if flat else std)
    one.close("weight_skewness", math.nan if flat else ((w - mean) ** 3).mean() / std**3, 1e-8)
    one.close("weight_kurtosis", math.nan if flat else ((w - mean) ** 4).mean() / std**4 - 3, 1e-8)
    one.relative("effective_fan_in", (w**2).sum() ** 2 / (w**4).sum() if w.any() else math.nan)
    same = [v for v in range(len(raw.w)) if v != one.unit and raw.group[v] == raw.group[one.unit]]
    if same and len(w) > 1:
        cosines = {v: cos(w, raw.w[v]) for v in same}
        best = max((value for value in cosines.values() if value == value), default=math.nan)
        one.close("neighbour_cos", best, 1e-10)
        first = next((v for v in same if cosines[v] >= best - 1e-11), None)
        one.exactly("neighbour_unit", first)
    else:
        one.null("neighbour_unit", "neighbour_cos")
    if raw.twin_w is None:
        one.null("twin_cos", "twin_distance")
    else:
        one.close("twin_cos", cos(w, raw.twin_w[one.unit]), 1e-9)
        one.relative("twin_distance", np.linalg.norm(w - raw.twin_w[one.unit]))
