"""What the units of a site share."""

from __future__ import annotations

import math

import numpy as np

from tests.statistics.recompute.raw import Unit


def check_redundancy(units: list[Unit]) -> None:
    raw = units[0].raw
    shown = np.ones(raw.z.shape[:2], bool) if raw.mask is None else raw.mask
    # rows that no unit can make anything of are no presentations of the site
    some = (np.isfinite(raw.z) & np.isfinite(raw.a)).any(-1)
    z, a = raw.z[shown & some], raw.a[shown & some]
    finite = (np.isfinite(z) & np.isfinite(a)).all(0)
    known = [u for u in range(len(units)) if len(a) > 2 and finite[u] and a[:, u].min() < a[:, u].max()]
    cov = np.cov(a[:, known].T, bias=True).reshape(len(known), -1) if known else np.zeros((0, 0))
    dimension = np.trace(cov) ** 2 / (cov**2).sum() if known else math.nan
    for one in units:
        one.exactly("redundancy_n", len(a))
        one.relative("redundancy_dimension", dimension, 1e-5)
        others = [v for v in known if v != one.unit] if one.unit in known else []
        one.exactly("redundancy_compared", len(others))
        if not others:
            one.null("redundancy_unit")
            one.close("redundancy_r", math.nan, 0)
            if raw.fires:
                one.close("redundancy_lift", math.nan, 0)
            else:
                one.null("redundancy_lift")
            continue
        r = {v: np.corrcoef(a[:, one.unit], a[:, v])[0, 1] for v in others}
        best = one.take("redundancy_unit")
        assert abs(r[best]) >= max(map(abs, r.values())) - 2.0**-17
        one.close("redundancy_r", r[best], 1e-5)
        fired, other = z[:, one.unit] > 0, z[:, best] > 0
        chance = fired.mean() * other.mean()
        if raw.fires:
            one.relative("redundancy_lift", (fired & other).mean() / chance if chance else math.nan)
        else:
            one.null("redundancy_lift")
