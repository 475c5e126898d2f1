"""What a unit fires for: its best class, selectivity and information, each beside the same under drawn labels.

Layer 2: pure torch; imports `base`, `kernels` and what is below. Counted per row, over rows with a known label: a row
fires if any of its positions does, its a is the greatest of them. Where the data has a label for each position, each
presentation counts as a row does, at sites whose positions are those that have labels; elsewhere every column is null.

The control label′ of a row is drawn by the hash of its uid (and position); its firing rates per class are weighted by
the real sizes of the classes, so that it has the prior of the data whatever weights it was drawn with.

Shapes: R rows, U units, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from pipeline.columns import Column
from pipeline.counted import counted
from pipeline.hashing import MASK, splitmix64
from pipeline.kernels.base import Primitive, State
from pipeline.kernels.by_position import POSITION_SEED
from pipeline.kernels.classsums import ClassSums
from pipeline.kernels.whole import Array, Whole
from pipeline.sites import Presentations, Site
from pipeline.statistics.base import Controls, Nullable, Rows, Statistic, Values, part

NULL_SEED = 0x1ABE1
# gates whose output is never negative: selectivity of signed values is undefined
NON_NEGATIVE = frozenset(
    {"relu", "relu6", "sigmoid", "hardsigmoid", "softplus", "exp", "exp2", "square", "abs", "sqrt"}
)
# terms that differ by less are a tie: logarithms of different libraries agree to about 1e-16
TIE = 1e-12
# n, fired, mean, m2 by label; n, fired, mean by drawn label
_BYTES_PER_CLASS = 8 * (4 + 3)

_NONE = "null without labels, or where they are of positions and the site has others"
_FIRING = f"{_NONE}, or where the gate is no nonlinearity"
_BEST = f"{_FIRING}; NaN where F = 0: the unit never fires"
_SIGNED = (
    f"{_NONE}, or where the gate, or the product of a pair, can be negative; NaN with rows of fewer than two classes, "
    "or if every mean is 0"
)
_TERM = "t_c = f_c/N·ln(f_c·N/(n_c·F)); n, f: rows and firing rows of the class, N, F: of all"
# the control's, whose classes keep their real sizes
_LABEL = (
    f"; label′: the class in whose share of Σ prior (1 each, where it is empty) splitmix64(s ^ uid)/2⁶³ falls, "
    f"s = splitmix64(splitmix64(0x{NULL_SEED:X})); of a position uid = splitmix64(splitmix64(splitmix64("
    f"0x{POSITION_SEED:X}) + position) ^ uid); splitmix64 of Steele et al. 2014, without its sign bit"
)
_DRAWN = "; f_c: n_c · the share of rows with label′ = c that fire (of all rows, where none has it), F = Σf_c" + _LABEL
_DRAWN_MEANS = "; of the means by label′" + _LABEL


def _columns_of(suffix: str, note: str, drawn: str = "", drawn_means: str = "") -> tuple[Column, ...]:
    def column(name: str, meaning: str, formula: str, **fields: Any) -> Column:
        of_control = drawn_means if name == "class_selectivity" else drawn
        return Column(f"{name}{suffix}", meaning=f"{meaning}{note}.", formula=formula + of_control, **fields)

    share: dict[str, Any] = {"dtype": "float64", "range": "[0, 1]", "null": _BEST}
    return (
        column("best_class", "Class whose rows the unit detects best", dtype="int32", unit="class", range="[0, C)",
               null=f"{_FIRING}, or where F = 0: the unit never fires",
               formula=f"argmax t_c, ties to the lowest; {_TERM}"),
        column("class_selectivity", "How far the class with the greatest mean output stands out from the others",
               dtype="float64", range="[0, 1]", null=_SIGNED, formula="(µ_max − µ_rest)/(µ_max + µ_rest), "
               "µ_c: mean over the class's rows of a row's "
               "greatest a, µ_rest: mean of the other classes' µ_c", source="Morcos et al. 2018", se=True),
        column("class_information", "Mutual information of firing and class", dtype="float64", unit="nat", range="≥ 0",
               null=f"{_FIRING}; NaN without rows", formula="Σ_c Σ_fires p(c, fires)·ln(p(c, fires)/(p(c)·p(fires)))",
               se=True),
        column("best_class_precision", "Share of the firing rows that are of the best class", formula="f_c/F", **share),
        column("best_class_recall", "Share of the best class's rows that fire", formula="f_c/n_c", **share),
        column("best_class_iou", "Overlap of the firing rows and the best class's", source="Bau et al. 2017",
               formula="f_c/(F + n_c − f_c)", **share),
    )  # fmt: skip


COLUMNS = (
    *_columns_of("", ""),
    Column("class_information_bias", "float64", "What class_information is on average for a unit independent of class.",
           "nat", "≥ 0", f"{_FIRING}; NaN without rows", "(C − 1)/2N, C: classes with rows", "Miller 1955"),
    *_columns_of("_null", ", for labels drawn by a hash of the row: the control", _DRAWN, _DRAWN_MEANS),
    Column("class", "int32", "Class id.", "class", "[0, C)", table="classes"),
    Column("n", "int64", "Rows of the class with a presentation that counts; where positions have labels, it "
           "and all by class is of presentations.", "rows", "≥ 0", formula="n_c", table="classes"),
    Column("fired", "int64", "Rows of the class in which the unit fires at some position.", "rows", "[0, n]",
           "null where the gate is no nonlinearity", "f_c = #(rows with z > 0 anywhere)", table="classes"),
    Column("fire_rate", "float64", "Share of the class's rows in which the unit fires.", "1", "[0, 1]",
           "null where the gate is no nonlinearity; NaN where n = 0", "fired/n", table="classes"),
    Column("a_mean", "float64", "Mean over the class's rows of the greatest a of the row.", "a",
           null="NaN where n = 0", formula="ā = Σ_rows max_positions a / n", table="classes"),
    Column("a_std", "float64", "Standard deviation over the class's rows of the greatest a of the row.", "a", "≥ 0",
           "NaN where n = 0", "√(Σ_rows (max_positions a − ā)² / n)", table="classes"),
)  # fmt: skip


@dataclass(frozen=True)
class Labels(Statistic):
    """What classes a unit fires for.

    prior  weights with which the control's classes are drawn, one whole number per class; equal ones if empty. With
           very unequal classes, their sizes give the control of a rare class the noise that it should have
    """

    prior: tuple[int, ...] = ()

    name = "labels"
    version = 1
    COLUMNS = COLUMNS

    @classmethod
    def expected(cls, parameter: str, value: Any) -> str | None:
        """See `Statistic`."""
        if parameter != "prior":
            return super().expected(parameter, value)
        fits = all(type(weight) is int and weight >= 0 for weight in value) and (sum(value) > 0 or not value)
        return None if fits else "whole numbers, none negative and not all 0"

    def unfit(self, classes: int) -> Mapping[str, str]:
        """See `Statistic`."""
        if not self.prior or classes in (0, len(self.prior)):
            return {}
        return {"prior": f"{counted(classes, 'weight')}, one for each class of the data"}

    def primitives(self, site: Site) -> Mapping[str, Primitive]:
        """Sums by label and by drawn label."""
        return {"true": ClassSums(), "null": ClassSums(NULL_SEED, tuple(self.prior))}

    def state_bytes(self, site: Site, classes: int = 0) -> int:
        """Bytes of the state of one site: it grows with the classes."""
        return site.units * classes * _BYTES_PER_CLASS

    def rows_together(self, site: Site) -> int:
        """Each unit alone."""
        return 1

    def columns(self, site: Site, state: State, controls: Controls) -> Rows:
        """One row per unit, and one per unit and class; nothing without labels."""
        true, null = part(state, "true"), part(state, "null")
        if true["n"].shape[1] == 0:
            return {}
        neurons = _selectivity(true, null) if site.gate in NON_NEGATIVE else {}
        if site.fires:
            neurons |= _detection(true, null)
        return {"neurons": neurons, "classes": _classes(true, site.fires)}

    def define(self, site: Site, whole: Presentations, controls: Controls) -> Rows:
        """From the whole z, a and labels, in NumPy."""
        if (whole.label_N is None and whole.label_LS is None) or whole.classes == 0:
            return {}
        return _definition(Whole(whole), self.prior or (1,) * whole.classes)


STATISTIC = Labels()


class Detection(NamedTuple):
    """What is known of firing and class, per unit."""

    best_U: torch.Tensor
    information_U: torch.Tensor
    precision_U: torch.Tensor
    recall_U: torch.Tensor
    iou_U: torch.Tensor


def _selectivity(true: State, null: State) -> dict[str, Values]:
    return {
        "class_selectivity": _selectivity_of(true["n"], true["mean"]),
        "class_selectivity_null": _selectivity_of(null["n"], null["mean"]),
    }


def _selectivity_of(n_UC: torch.Tensor, mean_UC: torch.Tensor) -> torch.Tensor:
    seen_UC = n_UC > 0
    greatest_U, where_U = mean_UC.masked_fill(~seen_UC, -torch.inf).max(1)
    others_UC = mean_UC.masked_fill(~seen_UC, 0).scatter(1, where_U[:, None], 0)
    others_U = seen_UC.sum(1) - 1
    rest_U = others_UC.sum(1) / others_U.clamp(min=1)
    selectivity_U = (greatest_U - rest_U) / (greatest_U + rest_U)
    return selectivity_U.masked_fill(others_U < 1, torch.nan)


def _detection(true: State, null: State) -> dict[str, Values]:
    n_UC = true["n"].double()
    rate_UC = null["fired"] / null["n"].double()
    overall_U1 = true["fired"].sum(1, keepdim=True) / n_UC.sum(1, keepdim=True).clamp(min=1)
    null_UC = torch.where(null["n"] > 0, rate_UC, overall_U1) * n_UC
    classes_U = (n_UC > 0).sum(1)
    columns: dict[str, Values] = {
        "class_information_bias": ((classes_U - 1) / (2 * n_UC.sum(1))).masked_fill(classes_U == 0, torch.nan)
    }
    for suffix, fired_UC in (("", true["fired"].double()), ("_null", null_UC)):
        found = _detection_of(n_UC, fired_UC)
        columns[f"best_class{suffix}"] = Nullable(found.best_U, fired_UC.sum(1) > 0)
        columns[f"class_information{suffix}"] = found.information_U
        columns[f"best_class_precision{suffix}"] = found.precision_U
        columns[f"best_class_recall{suffix}"] = found.recall_U
        columns[f"best_class_iou{suffix}"] = found.iou_U
    return columns


def _detection_of(n_UC: torch.Tensor, fired_UC: torch.Tensor) -> Detection:
    all_U1, fired_U1 = n_UC.sum(1, keepdim=True), fired_UC.sum(1, keepdim=True)
    firing_UC = _terms(fired_UC, n_UC, fired_U1, all_U1)
    silent_UC = _terms(n_UC - fired_UC, n_UC, all_U1 - fired_U1, all_U1)
    information_U = (firing_UC + silent_UC).sum(1).clamp(min=0)
    seen_UC = firing_UC.masked_fill(n_UC == 0, -torch.inf)
    best_U1 = (seen_UC >= seen_UC.amax(1, keepdim=True) - TIE).int().argmax(1, keepdim=True)
    best_n_U, best_fired_U = n_UC.gather(1, best_U1)[:, 0], fired_UC.gather(1, best_U1)[:, 0]
    fired_U = fired_U1[:, 0].masked_fill(fired_U1[:, 0] == 0, torch.nan)
    return Detection(
        best_U=best_U1[:, 0],
        information_U=information_U.masked_fill(all_U1[:, 0] == 0, torch.nan),
        precision_U=best_fired_U / fired_U,
        recall_U=(best_fired_U / best_n_U).masked_fill(fired_U.isnan(), torch.nan),
        iou_U=best_fired_U / (fired_U + best_n_U - best_fired_U),
    )


def _terms(joint_UC: torch.Tensor, n_UC: torch.Tensor, both_U1: torch.Tensor, all_U1: torch.Tensor) -> torch.Tensor:
    """p(c, s) ln(p(c, s) / (p(c) p(s))) of the rows of each class in one state s; 0 where there are none."""
    terms_UC = joint_UC / all_U1 * (joint_UC * all_U1 / (n_UC * both_U1)).log()
    return terms_UC.masked_fill(joint_UC <= 0, 0)


def _classes(true: State, fires: bool) -> dict[str, Values]:
    units, classes = true["n"].shape
    n, mean = true["n"].flatten(), true["mean"].flatten()
    rows: dict[str, Values] = {
        "unit": torch.arange(units).repeat_interleave(classes),
        "class": torch.arange(classes).repeat(units),
        "n": n,
        "a_mean": mean.masked_fill(n == 0, torch.nan),
        "a_std": (true["m2"].flatten() / n.double()).sqrt(),
    }
    if fires:
        fired = true["fired"].flatten()
        rows |= {"fired": fired, "fire_rate": fired / n.double()}
    return rows


def _definition(whole: Whole, prior: tuple[int, ...]) -> Rows:
    site = whole.shown.site
    label_R, uids = _define_labelled(whole)
    starts = np.cumsum([0, *prior])
    hashes = [splitmix64(splitmix64(splitmix64(NULL_SEED)) ^ uid) for uid in uids]
    drawn_R = np.array([np.searchsorted(starts, h * sum(prior) >> 63, side="right") - 1 for h in hashes], dtype=int)
    neurons: list[dict[str, Any]] = []
    classes: list[dict[str, Any]] = []
    for unit in range(site.units):
        a_R, fired_R = _define_rows(whole, unit)
        known_R = ~np.isnan(a_R) & (label_R >= 0) & (label_R < len(prior))
        a, fired, label, drawn = a_R[known_R], fired_R[known_R], label_R[known_R], drawn_R[known_R]
        one = _define_selectivity(a, label, "") | _define_selectivity(a, drawn, "_null")
        n_C = np.bincount(label, minlength=len(prior))
        fired_C = np.bincount(label[fired], minlength=len(prior))
        null_C = [
            n_C[c] * (fired[drawn == c].mean() if (drawn == c).any() else fired.mean()) if n_C[c] else 0.0
            for c in range(len(prior))
        ]
        one |= _define_detection(n_C, fired_C, "") | _define_detection(n_C, np.array(null_C), "_null")
        one["class_information_bias"] = ((n_C > 0).sum() - 1) / (2 * n_C.sum()) if len(a) else np.nan
        neurons.append(one)
        for c in range(len(prior)):
            of_class = a[label == c]
            mean, std = (of_class.mean(), of_class.std()) if len(of_class) else (np.nan, np.nan)
            rate = fired_C[c] / n_C[c] if n_C[c] else np.nan
            classes.append({"unit": unit, "class": c, "n": n_C[c], "fired": fired_C[c], "fire_rate": rate,
                            "a_mean": mean, "a_std": std})  # fmt: skip
    columns: dict[str, Values] = {
        name: torch.as_tensor(np.array([one[name] for one in neurons])) for name in neurons[0]
    }
    for suffix in ("", "_null"):
        best_U = torch.tensor([one[f"best_class{suffix}"] for one in neurons])
        columns[f"best_class{suffix}"] = Nullable(best_U.clamp(min=0), best_U >= 0)
    per_class = {name: torch.as_tensor(np.array([one[name] for one in classes])) for name in classes[0]}
    left_out = set() if site.fires else {name for name in columns if "selectivity" not in name} | {"fired", "fire_rate"}
    if site.gate not in NON_NEGATIVE:
        left_out |= {"class_selectivity", "class_selectivity_null"}
    kept = {name: values for name, values in columns.items() if name not in left_out}
    return {"neurons": kept, "classes": {name: per_class[name] for name in per_class if name not in left_out}}


def _define_labelled(whole: Whole) -> tuple[Array, list[int]]:
    """Label and uid of what has a label: of each row, or of each unmasked presentation."""
    shown = whole.shown
    if shown.label_LS is None:
        return np.asarray(shown.label_N), shown.uid_N.tolist()
    start = splitmix64(POSITION_SEED)
    named = zip(whole.uid_P.tolist(), whole.position_P.tolist(), strict=True)
    uids = [splitmix64(splitmix64((start + position) & MASK) ^ uid) for uid, position in named]
    return np.asarray(shown.label_LS).reshape(-1)[whole.kept], uids


def _define_rows(whole: Whole, unit: int) -> tuple[Array, Array]:
    """Greatest a of each row (NaN for a row without presentations) and whether it fires; of presentations, each."""
    if whole.shown.label_LS is not None:
        valid_P = whole.valid_PU[:, unit]
        return np.where(valid_P, whole.a_PU[:, unit], np.nan), valid_P & (whole.z_PU[:, unit] > 0)
    rows = whole.shown.rows
    a_R, fired_R = np.full(rows, np.nan), np.zeros(rows, dtype=bool)
    for p in np.flatnonzero(whole.valid_PU[:, unit]):
        row = whole.row_P[p]
        a_R[row] = np.fmax(a_R[row], whole.a_PU[p, unit])
        fired_R[row] |= whole.z_PU[p, unit] > 0
    return a_R, fired_R


def _define_selectivity(a: Array, label: Array, suffix: str) -> dict[str, Any]:
    means = sorted(a[label == c].mean() for c in np.unique(label))
    greatest, rest = (means[-1], np.mean(means[:-1])) if len(means) > 1 else (np.nan, np.nan)
    return {f"class_selectivity{suffix}": (greatest - rest) / (greatest + rest) if greatest + rest else np.nan}


def _define_detection(n_C: Array, fired_C: Array, suffix: str) -> dict[str, Any]:
    n, fired, nan = n_C.sum(), fired_C.sum(), np.nan
    cells = [(fired_C, fired), (n_C - fired_C, n - fired)]
    terms = [[f / n * np.log(f * n / (k * s)) if f > 0 else 0.0 for f, k in zip(f_C, n_C, strict=True)]
             for f_C, s in cells]  # fmt: skip
    seen = [term if k else -np.inf for term, k in zip(terms[0], n_C, strict=True)]
    best = next(c for c, term in enumerate(seen) if term >= max(seen) - TIE)
    f, k = fired_C[best], n_C[best]
    found = {
        "best_class": best if fired > 0 else -1,
        "class_information": max(float(np.sum(terms)), 0.0) if n else nan,
        "best_class_precision": f / fired if fired else nan,
        "best_class_recall": f / k if fired else nan,
        "best_class_iou": f / (fired + k - f) if fired else nan,
    }
    return {f"{name}{suffix}": value for name, value in found.items()}
