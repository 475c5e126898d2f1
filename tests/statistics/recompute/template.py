"""What drives a unit beside its pattern: cosines, their controls, and the vectors themselves."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np

from tests.statistics.recompute.raw import Array, Row, Unit, cos, kept_inputs, near, splitmix

RIDGE, PERMUTATIONS = 1e-3, 100


@cache
def orders(entries: int) -> list[Array]:
    """The hundred fixed orders in which a pattern's entries are permuted."""
    hashed = [[splitmix(splitmix(splitmix(seed)) ^ entry) for entry in range(entries)] for seed in range(PERMUTATIONS)]
    return [np.argsort(np.array(one, dtype=np.int64), kind="stable") for one in hashed]


def check_template(one: Unit, pattern: Row) -> None:
    raw, unit = one.raw, one.unit
    x, a, fired = kept_inputs(one)
    one.exactly("template_n", len(x))
    mean = x.mean(0) if len(x) else np.full(len(one.w), math.nan)
    rest, a_rest = x - mean, a - (a.mean() if len(a) else 0)
    constant = not len(a) or a.min() == a.max() or (x.min(0) == x.max(0)).all()
    cov = (a_rest[:, None] * rest).mean(0) if not constant else np.zeros(len(one.w))
    size = a.std() * math.sqrt(x.var(0).sum()) if len(a) else 0
    resolved = np.linalg.norm(cov) > 2.0**-14 * size
    tight = 1e-5 * max(1.0, size / np.linalg.norm(cov)) if resolved else 0
    same = [v for v in range(len(raw.w)) if v != unit and raw.group[v] == raw.group[unit]]
    shuffled = [abs(cos(cov, one.w[order])) for order in orders(len(one.w))]
    compared = {
        "template_cos": cos(cov, one.w),
        "template_cos_permuted_mean": np.mean(shuffled),
        "template_cos_permuted_p95": np.quantile(shuffled, 0.95),
    }
    others = np.array([cos(cov, raw.w[v]) for v in same])
    if same:
        compared |= {
            "template_cos_other_mean": np.nanmean(np.abs(others)) if not np.isnan(others).all() else math.nan,
            "template_cos_other_p95": np.nanquantile(np.abs(others), 0.95) if not np.isnan(others).all() else math.nan,
            "template_cos_other_signed": np.nanmean(others) if not np.isnan(others).all() else math.nan,
        }
    else:
        one.null("template_cos_other_mean", "template_cos_other_p95", "template_cos_other_signed")
    for name, wanted in compared.items():
        one.close(name, wanted if resolved else math.nan, tight)
    everyone = raw.x[np.isfinite(raw.x[:, :, raw.group[unit]]).all(-1) & (True if raw.mask is None else raw.mask)]
    if raw.fires and len(one.w) <= 1024:
        sigma = np.cov(everyone[:, raw.group[unit]].T, bias=True).reshape(len(one.w), -1)
        loaded = sigma + RIDGE * np.trace(sigma) / len(one.w) * np.eye(len(one.w))
        whitened = cos(np.linalg.solve(loaded, cov), one.w) if resolved else math.nan
        one.close("template_cos_whitened", whitened, 3e-3)
    else:
        one.null("template_cos_whitened")
    check_vectors(one, pattern, x=x, fired=fired, cov=cov, resolved=resolved)


def check_vectors(one: Unit, pattern: Row, *, x: Array, fired: Array, cov: Array, resolved: bool) -> None:
    raw, unit = one.raw, one.unit
    n = len(x)
    check_vector(pattern["weight"], one.w, 1e-6, "weight")
    near(pattern["bias"], one.b, 1e-6 * max(1, abs(one.b)), "patterns.bias")
    for name, wanted in (("raw_weight", raw.raw_w), ("up_weight", raw.up_w)):
        if wanted is None:
            assert pattern[name] is None, name
        else:
            check_vector(pattern[name], wanted[unit], 1e-6, name)
    check_vector(pattern["mean_x"], x.mean(0) if n else np.full(len(one.w), math.nan), 1e-5, "mean_x")
    if resolved:
        check_vector(
            pattern["cov"], cov, 1e-5 * max(1, np.linalg.norm(x.std(0)) * one.a.std() / np.linalg.norm(cov)), "cov"
        )
    else:
        assert not np.nan_to_num(pattern["cov"]).any()
    if not raw.fires:
        one.null("template_cos_sta")
        assert pattern["sta"] is None
        return
    if not fired.any() or fired.all():
        one.close("template_cos_sta", math.nan, 0)
        assert not np.nan_to_num(pattern["sta"]).any()
        return
    sta = x[fired].mean(0) - x.mean(0)
    loose = max(1, np.linalg.norm(x.std(0)) * math.sqrt((1 - fired.mean()) / fired.mean()) / np.linalg.norm(sta))
    one.close("template_cos_sta", cos(sta, one.w), 1e-5 * loose)
    check_vector(pattern["sta"], sta, 1e-5 * loose, "sta")


def check_vector(got: Any, wanted: Array, allowed: float, what: str) -> None:
    got = np.asarray(got, dtype=float)
    assert got.shape == wanted.shape, what
    assert (np.isnan(got) == np.isnan(wanted)).all(), what
    error = np.linalg.norm(np.nan_to_num(got - wanted))
    assert error <= allowed * np.linalg.norm(np.nan_to_num(wanted)), f"{what}: off by {error}"
