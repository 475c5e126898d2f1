"""How well inputs match a pattern, in both forms, and what the match says of firing."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score

from tests.statistics.recompute.raw import QUANTILES, Array, Unit, near

MATCH_EDGES = [0.0, *(2.0**e * (1 + m / 8) for e in range(-12, 0) for m in range(8)), 1.0]


def matches(form: str, z: Array, x: Array, w: Array, b: float) -> Array:
    """Match of every presentation; NaN where undefined. By z, as it is defined, not by x·w."""
    with np.errstate(all="ignore"):
        square = (x * x).sum(1)
        if form == "cosine":
            value = (z - b) / (np.sqrt(square) * np.linalg.norm(w))
            undefined = (square == 0) | (np.linalg.norm(w) == 0)
        else:
            rest, rest_w = x - x.mean(1, keepdims=True), w - w.mean()
            spread = (rest * rest).sum(1)
            value = (z - b - x.sum(1) * w.mean()) / (np.sqrt(spread) * np.linalg.norm(rest_w))
            undefined = (spread <= 2.0**-40 * square) | (len(w) < 3) | (rest_w @ rest_w <= 2.0**-40 * (w @ w))
        value = np.clip(value, -1, 1)
    value[undefined | ~np.isfinite(square)] = np.nan
    return value


def check_match(one: Unit, histogram: pd.DataFrame) -> None:
    raw = one.raw
    every = np.ones(raw.z.shape[:2], bool) if raw.mask is None else raw.mask
    with np.errstate(all="ignore"):
        length = np.sqrt((raw.x[every][:, raw.group[one.unit]] ** 2).sum(1))
    length = length[np.isfinite(length)]
    product = np.linalg.norm(one.w) * (length.mean() if len(length) else 0)
    one.relative("tau", -one.b / product if product else math.nan)
    for form in ("pearson", "cosine"):
        m = matches(form, one.z, one.x, one.w, one.b)
        known = ~np.isnan(m)
        # z is the model's own: in its precision, the match is that of x and w
        direct = one.x[known] @ one.w if form == "cosine" else None
        if direct is not None and len(direct):
            length = np.linalg.norm(one.x[known], axis=1) * np.linalg.norm(one.w)
            size = np.abs(one.z[known]).max() + abs(one.b)
            assert (np.abs(m[known] - np.clip(direct / length, -1, 1)) <= 1e-5 * (1 + size / length)).all()
        elif len(one.w) > 2 and known.any():
            direct = np.array([np.corrcoef(x, one.w)[0, 1] for x in one.x[known]])
            scale = np.linalg.norm(one.x[known], axis=1) / one.x[known].std(1) / np.sqrt(len(one.w))
            scale = scale * np.linalg.norm(one.w) / (one.w.std() * np.sqrt(len(one.w)))
            assert (np.abs(m[known] - direct) <= 1e-5 * (1 + scale)).all()
        bins = histogram[(histogram["unit"] == one.unit) & (histogram["quantity"] == form)]
        check_form(one, form, m[known], one.fired[known], undefined=int((~known).sum()), bins=bins)


def check_form(one: Unit, form: str, m: Array, fired: Array, *, undefined: int, bins: pd.DataFrame) -> None:
    n, nan = len(m), math.nan
    one.exactly(f"{form}_n", n)
    one.exactly(f"{form}_undefined", undefined)
    one.close(f"{form}_mean", m.mean() if n else nan, 1e-12)
    one.close(f"{form}_std", m.std() if n else nan, 1e-8 if n and m.std() < 1e-6 else 1e-11)
    for name in ("q05", "q50", "q95"):
        true = np.sort(m)[max(math.ceil(QUANTILES[name] * n), 1) - 1] if n else nan
        one.close(f"{form}_{name}", true, max(0.125 * abs(true), 2.0**-12))
    check_bins(bins, m, fired if one.raw.fires else None, MATCH_EDGES, top=1.0)
    derived = ("firing_mean", "silent_mean", "auroc", "auroc_bound", "half")
    if not one.raw.fires:
        one.null(*(f"{form}_{name}" for name in derived))
        return
    one.close(f"{form}_firing_mean", m[fired].mean() if fired.any() else nan, 1e-12)
    one.close(f"{form}_silent_mean", m[~fired].mean() if (~fired).any() else nan, 1e-12)
    if not fired.any() or fired.all():
        for name in derived[2:]:
            one.close(f"{form}_{name}", nan, 0)
        return
    # from the counts, which were compared with m above
    low, count, of_fired = bins["low"].to_numpy(), bins["count"].to_numpy(), bins["fired"].to_numpy()
    p, q = of_fired / of_fired.sum(), (count - of_fired) / (count - of_fired).sum()
    bound = 0.5 * (p * q).sum()
    one.close(f"{form}_auroc_bound", bound, 1e-12)
    got = one.take(f"{form}_auroc")
    near(got, roc_auc_score(fired, m), bound + 1e-9, f"unit {one.unit} {form}_auroc")
    order = np.argsort(low)
    below = np.cumsum(q[order]) - q[order]
    near(got, float((p[order] * (below + q[order] / 2)).sum()), 1e-12, f"{form}_auroc of bins")
    check_half(one, form, bins)


def check_half(one: Unit, form: str, bins: pd.DataFrame) -> None:
    """The edges at which "fires above" is wrong least often; the middle of the outermost of them."""
    edges = np.array(sorted({-edge for edge in MATCH_EDGES} | set(MATCH_EDGES)))
    low, high = bins["low"].to_numpy(), bins["high"].to_numpy()
    fired, silent = bins["fired"].to_numpy(), (bins["count"] - bins["fired"]).to_numpy()
    wrong = np.array([fired[high <= edge].sum() + silent[low >= edge].sum() for edge in edges])
    best = edges[wrong == wrong.min()]
    outermost = best[0] == -1 or best[-1] == 1
    one.close(f"{form}_half", math.nan if outermost else (best[0] + best[-1]) / 2, 1e-12)


def check_bins(bins: pd.DataFrame, value: Array, fired: Array | None, edges: list[float], *, top: float) -> None:
    """Edges are those of the rule; what lies below each is counted, but for values that round across it."""
    bins = bins.sort_values("low")
    low, high, count = (bins[name].to_numpy() for name in ("low", "high", "count"))
    assert count.sum() == len(value)
    assert (count > 0).all()
    allowed = {*edges, *(-edge for edge in edges)}
    assert {*low, *high} <= allowed
    slack = 1e-12 * np.maximum(np.abs(value), 1e-4)
    edge = np.where(high >= top, np.inf, high)
    least, most = (value + slack)[:, None] < edge, (value - slack)[:, None] <= edge
    total = count.cumsum()
    assert ((least.sum(0) <= total) & (total <= most.sum(0))).all()
    if fired is None:
        assert bins["fired"].isna().all()
        return
    total = bins["fired"].to_numpy().cumsum()
    assert ((least[fired].sum(0) <= total) & (total <= most[fired].sum(0))).all()
