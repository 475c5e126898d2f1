"""Every column of every table of units once more: from raw arrays, in NumPy float64, unit by unit, by the definitions.

Nothing of the program is imported. `check` compares the tables of one site with it: counts, choices and extremes
exactly, moments to rounding, what is read from bins within the bound that its column states. A column that is not
checked is an error, so that none is forgotten.

Shapes: N rows, S positions, P presentations that count for a unit, G groups, D fan-in, U units, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from sklearn.metrics import mutual_info_score, roc_auc_score

Array = np.ndarray
Row = dict[str, Any]

KEYS = {"run", "model", "data", "split", "site", "unit"}
OF_UNITS = {"neurons", "histograms", "exemplars", "classes", "patterns", "edges"}
M64 = (1 << 64) - 1
EXEMPLAR_SEED, LABEL_SEED, POSITION_SEED = 0xE8E3, 0x1ABE1, 0x9051710
QUANTILES = {"q001": 0.001, "q01": 0.01, "q05": 0.05, "q25": 0.25, "q50": 0.5, "q75": 0.75, "q95": 0.95, "q99": 0.99,
             "q999": 0.999}  # fmt: skip
RIDGE, PERMUTATIONS, KEPT, PER_OCTAVE, TOP = 1e-3, 100, 10, 2, 8


@dataclass
class Raw:
    """What a site was shown and made of it, captured by other means than the program's.

    z, a (N, S, U); x (N, S, G, D); w (U, D), b (U): in the space of x, norms folded in; label (N) of rows or label_at
    (N, S) of positions; mask (N, S), True where a position is real; gradient (N, S, U) of the sum of the rows' losses
    at a; `contributors` says which inputs of a unit are one source: by unit u and input d its number in the table of
    edges.
    """

    z: Array
    a: Array
    x: Array
    w: Array
    b: Array
    uid: Array
    fires: bool
    non_negative: bool
    label: Array | None = None
    label_at: Array | None = None
    classes: int = 0
    mask: Array | None = None
    gradient: Array | None = None
    raw_w: Array | None = None
    up_w: Array | None = None
    twin_w: Array | None = None
    contributors: Callable[[int, int], int] = lambda unit, number: number

    @property
    def group(self) -> Array:
        """The group of each unit."""
        return np.arange(len(self.w)) // (len(self.w) // self.x.shape[2])


def splitmix(value: int) -> int:
    """Vigna's generator without its sign bit."""
    z = (value + 0x9E3779B97F4A7C15) & M64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & M64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & M64
    return (z ^ (z >> 31)) & (M64 >> 1)


def draw(seed: int, unit: int, uid: int) -> int:
    """The hash by which rows are drawn."""
    return splitmix(splitmix((splitmix(seed) + unit) & M64) ^ uid)


def near(got: float | None, wanted: float, allowed: float, what: str) -> None:
    """Within the tolerance, and undefined where it should be."""
    assert got is not None, f"{what} is null"
    both_undefined = math.isnan(wanted) and math.isnan(got)
    assert both_undefined or abs(got - wanted) <= allowed, f"{what}: {got} is not {wanted} to {allowed}"


class Unit:
    """One unit's presentations that count, and its row of `neurons`."""

    def __init__(self, raw: Raw, unit: int, row: Row) -> None:
        self.raw, self.unit, self.row, self.left = (
            raw,
            unit,
            row,
            {name for name in row if name not in KEYS and not name.endswith("_se")},
        )
        shown = np.ones(raw.z.shape[:2], bool) if raw.mask is None else raw.mask
        self.valid = shown & np.isfinite(raw.z[..., unit]) & np.isfinite(raw.a[..., unit])
        self.shown = int(shown.sum())
        self.n_at, self.s_at = self.valid.nonzero()
        self.z, self.a = raw.z[self.valid][:, unit], raw.a[self.valid][:, unit]
        self.x = raw.x[self.valid][:, raw.group[unit]]
        self.w, self.b = raw.w[unit], float(raw.b[unit])
        self.fired = self.z > 0

    def take(self, name: str) -> Any:
        self.left.discard(name)
        return self.row[name]

    def null(self, *names: str) -> None:
        for name in names:
            assert self.take(name) is None, f"{name}: {self.row[name]} is not null"

    def exactly(self, name: str, wanted: Any) -> None:
        got = self.take(name)
        same = got is None if wanted is None else got == wanted or (got != got and wanted != wanted)
        assert same, f"unit {self.unit} {name}: {got} is not {wanted}"

    def close(self, name: str, wanted: float, allowed: float) -> None:
        near(self.take(name), float(wanted), allowed, f"unit {self.unit} {name}")

    def relative(self, name: str, wanted: float, allowed: float = 1e-9, floor: float = 1e-3) -> None:
        self.close(name, wanted, allowed * max(abs(wanted), floor) if wanted == wanted else 0)


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


MATCH_EDGES = [0.0, *(2.0**e * (1 + m / 8) for e in range(-12, 0) for m in range(8)), 1.0]


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


def cos(left: Array, right: Array) -> float:
    norms = np.linalg.norm(left) * np.linalg.norm(right)
    return float(np.clip(left @ right / norms, -1, 1)) if norms else math.nan


def kept_inputs(one: Unit) -> tuple[Array, Array, Array]:
    """x, a and whether it fires of the presentations whose x is finite too."""
    finite = np.isfinite(one.x).all(1)
    return one.x[finite], one.a[finite], one.fired[finite]


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


def presentations(one: Unit) -> list[Row]:
    m = matches("pearson", one.z, one.x, one.w, one.b)
    uid = one.raw.uid[one.n_at]
    return [
        {"uid": int(uid[p]), "position": int(one.s_at[p]), "z": one.z[p], "a": one.a[p], "match": m[p]}
        for p in range(len(one.z))
    ]


def representatives(shown: list[Row], key: Callable[[Row], float]) -> list[Row]:
    """Of each row the presentation with the smallest key, of equals the smallest position."""
    found: dict[int, Row] = {}
    for row in sorted(shown, key=lambda row: (key(row), row["position"])):
        found.setdefault(row["uid"], row)
    return list(found.values())


def octave(z: float) -> tuple[bool, int]:
    exponent = min(max(math.frexp(z)[1] - 1, -8), 7) if z else -8
    return z >= 0, exponent if z >= 0 else -exponent


def chosen(kind: str, unit: int, shown: list[Row]) -> list[Row]:
    if kind == "smallest":
        return sorted(representatives(shown, lambda row: row["z"]), key=lambda row: (row["z"], row["uid"]))[:KEPT]
    if kind == "match":
        known = representatives([row for row in shown if not math.isnan(row["match"])], lambda row: -row["match"])
        return sorted(known, key=lambda row: (-row["match"], row["uid"]))[:KEPT]
    rows = representatives(shown, lambda row: -row["z"])
    if kind == "greatest":
        return sorted(rows, key=lambda row: (-row["z"], row["uid"]))[:KEPT]
    rows.sort(key=lambda row: draw(EXEMPLAR_SEED, unit, row["uid"]))
    if kind == "random":
        return [row for row in rows if row["z"] > 0][:KEPT]
    octaves = sorted({octave(row["z"]) for row in rows})
    return [row for which in octaves for row in [one for one in rows if octave(one["z"]) == which][:PER_OCTAVE]]


def check_exemplars(one: Unit, exemplars: pd.DataFrame) -> None:
    shown = presentations(one)
    own = exemplars[exemplars["unit"] == one.unit]
    kinds = ["greatest", "smallest", "match", "octave", *(["random"] if one.raw.fires else [])]
    assert set(own["kind"]) <= set(kinds)
    for kind in kinds:
        got = own[own["kind"] == kind].sort_values("rank").to_dict("records")
        wanted = chosen(kind, one.unit, shown)
        assert [row["rank"] for row in got] == list(range(len(wanted))), kind
        for ours, theirs in zip(got, wanted, strict=True):
            near(ours["match"], theirs["match"], 1e-9, f"exemplars.match of {kind}")
            if kind == "match" and (ours["uid"], ours["position"]) != (theirs["uid"], theirs["position"]):
                continue  # a match that differs in its last bit only: the value was compared
            for name in ("uid", "position", "z", "a"):
                assert ours[name] == theirs[name], (one.unit, kind, ours, theirs)


def check_labels(one: Unit, classes: pd.DataFrame | None) -> None:
    raw, suffixes = one.raw, ("", "_null")
    detection = [f"{name}{end}" for end in suffixes for name in (
        "best_class", "class_information", "best_class_precision", "best_class_recall", "best_class_iou")]  # fmt: skip
    selectivity = [f"class_selectivity{end}" for end in suffixes]
    if raw.label is None and raw.label_at is None:
        one.null(*detection, *selectivity, "class_information_bias")
        return
    a, fired, label, uids = labelled_rows(one) if raw.label_at is None else labelled_positions(one)
    rows = len(label)
    hashed = [splitmix(splitmix(splitmix(LABEL_SEED)) ^ uid) for uid in uids]
    drawn = np.array([value * raw.classes >> 63 for value in hashed], dtype=int)
    assert classes is not None
    check_classes(one, classes, label=label, a=a, fired=fired)
    for end, labels in (("", label), ("_null", drawn)):
        if raw.non_negative:
            one.relative(f"class_selectivity{end}", selectivity_of(a, labels))
        else:
            one.null(f"class_selectivity{end}")
    if not raw.fires:
        one.null(*detection, "class_information_bias")
        return
    n_c = np.bincount(label, minlength=raw.classes)
    one.relative("class_information_bias", ((n_c > 0).sum() - 1) / (2 * rows) if rows else math.nan)
    fired_c = np.bincount(label[fired], minlength=raw.classes).astype(float)
    one.close("class_information", mutual_info_score(label, fired) if rows else math.nan, 1e-12)
    check_detection(one, "", n_c, fired_c)
    overall = fired.mean() if rows else 0.0
    rates = [fired[drawn == c].mean() if (drawn == c).any() else overall for c in range(raw.classes)]
    fired_null = np.array(rates) * n_c
    joint = np.array([fired_null, n_c - fired_null])
    one.close("class_information_null", information(joint) if rows else math.nan, 1e-12)
    check_detection(one, "_null", n_c, fired_null)


def labelled_rows(one: Unit) -> tuple[Array, Array, Array, list[int]]:
    """Greatest a, whether it fires, label and uid of each row of a known class."""
    raw = one.raw
    rows = [n for n in sorted(set(one.n_at.tolist())) if raw.label[n] >= 0]
    a = np.array([one.a[one.n_at == n].max() for n in rows])
    fired = np.array([one.fired[one.n_at == n].any() for n in rows], dtype=bool)
    return a, fired, np.array([raw.label[n] for n in rows], dtype=int), [int(raw.uid[n]) for n in rows]


def labelled_positions(one: Unit) -> tuple[Array, Array, Array, list[int]]:
    """The same of each position of a known class."""
    label = one.raw.label_at[one.n_at, one.s_at]
    known = label >= 0
    places = zip(one.n_at[known].tolist(), one.s_at[known].tolist(), strict=True)
    uids = [draw(POSITION_SEED, s, int(one.raw.uid[n])) for n, s in places]
    return one.a[known], one.fired[known], label[known], uids


def information(joint: Array) -> float:
    p = joint / joint.sum()
    expected = p.sum(0) * p.sum(1, keepdims=True)
    return float((p[p > 0] * np.log(p[p > 0] / expected[p > 0])).sum())


def selectivity_of(a: Array, label: Array) -> float:
    means = np.array([a[label == c].mean() for c in sorted(set(label.tolist()))])
    if len(means) < 2:
        return math.nan
    greatest = means.max()
    rest = (means.sum() - greatest) / (len(means) - 1)
    return (greatest - rest) / (greatest + rest) if greatest + rest else math.nan


def check_detection(one: Unit, end: str, n_c: Array, fired_c: Array) -> None:
    total, fired = n_c.sum(), fired_c.sum()
    names = [f"best_class_{name}{end}" for name in ("precision", "recall", "iou")]
    if not fired:
        one.null(f"best_class{end}")
        for name in names:
            one.close(name, math.nan, 0)
        return
    terms = [f / total * math.log(f * total / (n * fired)) if f > 0 else (0.0 if n else -math.inf)
             for f, n in zip(fired_c, n_c, strict=True)]  # fmt: skip
    best = next(c for c, term in enumerate(terms) if term >= max(terms) - 1e-12)
    one.exactly(f"best_class{end}", best)
    f, n = fired_c[best], n_c[best]
    for name, wanted in zip(names, (f / fired, f / n, f / (fired + n - f)), strict=True):
        one.relative(name, wanted)


def check_classes(one: Unit, classes: pd.DataFrame, *, label: Array, a: Array, fired: Array) -> None:
    own = classes[classes["unit"] == one.unit].sort_values("class")
    assert own["class"].tolist() == list(range(one.raw.classes))
    for row in own.to_dict("records"):
        of_class = label == row["class"]
        n = int(of_class.sum())
        assert row["n"] == n
        near(row["a_mean"], a[of_class].mean() if n else math.nan, 1e-12 * np.abs(a).max(initial=0), "classes.a_mean")
        scale = 1e-7 * np.abs(a).max(initial=0)
        near(row["a_std"], a[of_class].std() if n else math.nan, scale, "classes.a_std")
        if one.raw.fires:
            assert row["fired"] == fired[of_class].sum()
            near(row["fire_rate"], fired[of_class].mean() if n else math.nan, 1e-12, "classes.fire_rate")
        else:
            assert row["fired"] is None or math.isnan(row["fired"])


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


def check(raw: Raw, tables: Mapping[str, pa.Table], site: str) -> None:
    """Compare one site's rows of every table with what follows from its raw arrays; every column must be compared."""
    own = {name: table.filter(pc.equal(table["site"], site)) for name, table in tables.items() if name in OF_UNITS}
    # rows as they are, where null and NaN differ; frames for the rest
    neurons, patterns = (own[name].sort_by("unit").to_pylist() for name in ("neurons", "patterns"))
    frames = {name: table.to_pandas() for name, table in own.items() if name not in ("neurons", "patterns")}
    assert [row["unit"] for row in neurons] == list(range(len(raw.w)))
    units = [Unit(raw, unit, row) for unit, row in enumerate(neurons)]
    for one, pattern in zip(units, patterns, strict=True):
        check_response(one)
        check_z_bins(one, frames["histograms"])
        check_match(one, frames["histograms"])
        check_template(one, pattern)
        check_exemplars(one, frames["exemplars"])
        check_labels(one, frames.get("classes"))
        check_weights(one)
        check_importance(one)
        check_composition(one, frames.get("edges"))
    check_redundancy(units)
    for one in units:
        assert not one.left, f"not compared: {sorted(one.left)}"
