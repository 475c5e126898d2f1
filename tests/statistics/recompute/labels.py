"""What a unit tells of the classes, and of labels drawn at random."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from sklearn.metrics import mutual_info_score

from tests.statistics.recompute.raw import Array, Unit, draw, near, splitmix

LABEL_SEED, POSITION_SEED = 0x1ABE1, 0x9051710


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
