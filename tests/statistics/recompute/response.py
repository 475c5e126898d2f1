"""Moments, extremes, quantiles and firing of z and a, and the histogram of z."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from tests.statistics.recompute.raw import QUANTILES, Unit


def check_response(one: Unit) -> None:
    z, a, n = one.z, one.a, len(one.z)
    nan = math.nan
    one.exactly("n", n)
    one.exactly("n_zero", int((z == 0).sum()))
    one.exactly("n_nonfinite", one.shown - n)
    for name, value in (("z", z), ("a", a)):
        varied = n > 0 and value.min() < value.max()
        one.exactly(f"{name}_min", value.min() if n else nan)
        one.exactly(f"{name}_max", value.max() if n else nan)
        mean = math.fsum(value) / n if n else nan
        one.close(f"{name}_mean", mean, 1e-12 * np.abs(value).max(initial=0))
        rest = value - mean
        m2, m3, m4 = (math.fsum(rest**p) for p in (2, 3, 4))
        std = math.sqrt(m2 / n) if n else nan
        kappa = abs(mean) / std if varied else 0
        one.close(f"{name}_std", (std if varied else 0.0) if n else nan, 1e-12 * (1 + kappa) * std if varied else 0)
        scale = 1e-12 * (1 + kappa) * 4
        third = math.fsum(np.abs(rest) ** 3) / n / std**3 if varied else nan
        one.close(f"{name}_skewness", m3 / n / std**3 if varied else nan, scale * third)
        one.close(f"{name}_kurtosis", m4 / n / std**4 - 3 if varied else nan, scale * m4 / n / std**4 if varied else 0)
    for name, at in QUANTILES.items():
        true = np.sort(z)[max(math.ceil(at * n), 1) - 1] if n else nan
        one.close(f"z_{name}", true, max(0.25 * abs(true), 2.0**-13 * np.abs(z).max(initial=0)))
    absolute, square = math.fsum(np.abs(a)), math.fsum(a * a)
    one.relative(
        "a_hoyer", (math.sqrt(n) - absolute / math.sqrt(square)) / (math.sqrt(n) - 1) if n > 1 and square else nan
    )
    one.relative("a_treves_rolls", (absolute / n) ** 2 / (square / n) if square else nan)
    if not one.raw.fires:
        one.null("n_fired", "fire_rate", "row_fire_rate", "always_on", "dead", "dead_bound")
        return
    fired = int(one.fired.sum())
    one.exactly("n_fired", fired)
    one.relative("fire_rate", fired / n if n else nan)
    rows = len(set(one.n_at.tolist()))
    one.relative("row_fire_rate", len(set(one.n_at[one.fired].tolist())) / rows if rows else nan)
    one.exactly("always_on", bool(fired == n) if n else None)
    one.exactly("dead", bool(fired == 0) if n else None)
    if n and not fired:
        one.relative("dead_bound", 3 / n)
    else:
        one.null("dead_bound")


def check_z_bins(one: Unit, histogram: pd.DataFrame) -> None:
    bins = histogram[(histogram["unit"] == one.unit) & (histogram["quantity"] == "z")]
    assert bins["count"].sum() == len(one.z)
    for _, bin_ in bins.iterrows():
        low, high = bin_["low"], bin_["high"]
        # rising in magnitude: the edge nearer to 0 belongs to the bin
        inside = (one.z == 0) if low == high == 0 else (
            (one.z > max(low, 0)) | ((one.z == low) & (low > 0))) & (one.z < high) if high > 0 else (
            (one.z < min(high, 0)) | ((one.z == high) & (high < 0))) & (one.z > low)  # fmt: skip
        assert bin_["count"] == inside.sum(), (low, high)
        if one.raw.fires:
            assert bin_["fired"] == (inside & one.fired).sum()
        if abs(low) > 0 and abs(high) > 0:
            assert max(abs(low), abs(high)) <= 1.25 * min(abs(low), abs(high)) + 1e-300
        elif low != high:
            assert max(abs(low), abs(high)) <= 2.0**-13 * np.abs(one.z).max()
