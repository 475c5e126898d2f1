"""What the loss loses with a unit, to first order."""

from __future__ import annotations

import math

import numpy as np

from tests.statistics.recompute.raw import Unit


def check_importance(one: Unit) -> None:
    raw = one.raw
    names = ("importance_mean_ablation", "importance_zero_ablation")
    if raw.gradient is None or raw.label is None:
        one.exactly("importance_rows", 0)
        one.null(*names)
        return
    rows = int((raw.label >= 0).sum())
    one.exactly("importance_rows", rows)
    labelled = np.broadcast_to((raw.label >= 0)[:, None], one.valid.shape)
    g = raw.gradient[..., one.unit]
    keep = one.valid & labelled & np.isfinite(g)
    a, g = raw.a[keep][:, one.unit], g[keep]
    if not len(a):
        for name in names:
            one.close(name, math.nan, 0)
        return
    scale = np.abs(a * g).sum() / rows
    one.close(names[0], ((a.mean() - a) * g).sum() / rows, 1e-4 * scale)
    one.close(names[1], (-a * g).sum() / rows, 1e-4 * scale)
