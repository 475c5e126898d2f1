"""How well a unit's inputs match its pattern, and how well that predicts that it fires.

Layer 2: pure torch; imports `base`, `kernels` and what is below. Two forms: the correlation of x and w over the inputs
(pearson), and their cosine. Where a match is undefined it is counted apart and part of nothing else.

Shapes: P presentations, U units, B bins.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pipeline.columns import Column
from pipeline.kernels import matchbins
from pipeline.kernels.base import Primitive, State
from pipeline.kernels.bins import quantiles
from pipeline.kernels.match import Form
from pipeline.kernels.matchbins import InputNorm, MatchBins
from pipeline.kernels.moments import merge_central
from pipeline.kernels.whole import Array, Whole
from pipeline.sites import Presentations, Site
from pipeline.statistics.base import HISTOGRAM, Controls, Rows, Statistic, Values, part

FORMS: tuple[Form, ...] = ("pearson", "cosine")
QUANTILES = {"q05": 0.05, "q50": 0.5, "q95": 0.95}

_FIRING = "null where the gate is no nonlinearity; NaN where the unit never or always fires where it is defined"
_FORMULAS = {
    "pearson": "(w·x − w̄·Σx)/(‖x − x̄‖·‖w − w̄‖)",
    "cosine": "w·x/(‖x‖·‖w‖)",
}
_UNDEFINED = {
    "pearson": "x or w constant (Σ(x−x̄)² ≤ 2⁻⁴⁰Σx²), fewer than 3 inputs, or w·x or Σx² not finite",
    "cosine": "x = 0, w = 0, or w·x or Σx² not finite",
}
_NAMES = {"pearson": "correlation", "cosine": "cosine"}


def _columns_of(form: Form) -> tuple[Column, ...]:
    name, formula, none = _NAMES[form], f"m = {_FORMULAS[form]}", "NaN where it is defined nowhere"
    return (
        Column(f"{form}_n", "int64", f"Presentations at which the {name} of input and pattern is defined.",
               "presentations", "≥ 0", formula=f"n − {form}_undefined"),
        Column(f"{form}_undefined", "int64", f"Presentations at which the {name} is undefined: {_UNDEFINED[form]}.",
               "presentations", "≥ 0", formula=f"#({_UNDEFINED[form]})"),
        Column(f"{form}_mean", "float64", f"Mean {name} of input and pattern.", "1", "[−1, 1]", none, formula, se=True),
        Column(f"{form}_std", "float64", f"Standard deviation of the {name} of input and pattern.", "1", "[0, 1]", none,
               f"√(Σ(m−m̄)²/n), {formula}"),
        *(Column(f"{form}_{key}", "float64", f"Value below which about {at:.0%} of the {name} lie, read from its bins.",
                 "1", "[−1, 1]", none,
                 f"value of rank ⌈{at}·n⌉, placed evenly in its bin; off by < 12.5 % of itself or 2⁻¹²")
          for key, at in QUANTILES.items()),
        Column(f"{form}_firing_mean", "float64", f"Mean {name} when the unit fires.", "1", "[−1, 1]",
               "null where the gate is no nonlinearity; NaN where the unit never fires where m is defined",
               "mean of m where z > 0"),
        Column(f"{form}_silent_mean", "float64", f"Mean {name} when the unit is silent.", "1", "[−1, 1]",
               "null where the gate is no nonlinearity; NaN where the unit always fires where m is defined",
               "mean of m where z ≤ 0"),
        Column(f"{form}_auroc", "float64", f"How well the {name} predicts firing: probability that it is greater at a "
               "firing presentation than at a silent one.", "1", "[0, 1]", _FIRING,
               "Σ_i p_i(Σ_{j<i} q_j + ½q_i) over bins; p, q: shares of the firing, of the silent", "Fawcett 2006",
               se=True),
        Column(f"{form}_auroc_bound", "float64", f"How far {form}_auroc can be from that without bins.", "1", "[0, ½]",
               _FIRING, "½Σ_i p_i q_i"),
        Column(f"{form}_half", "float64", f"The {name} above which the unit rather fires than not: P(fires) crosses ½.",
               "1", "[−1, 1]", f"{_FIRING}, or where never or always firing is the best guess",
               "edge of bins with the fewest firing below it plus silent above it; the middle of the first and last"),
    )  # fmt: skip


COLUMNS = (
    *(column for form in FORMS for column in _columns_of(form)),
    Column("tau", "float64", "The cosine at which z crosses 0 for an input of mean length.", "1", "any",
           "NaN where w = 0, or where no x is finite or every one 0",
           "−b/(‖w‖·mean ‖x‖), over all unmasked x with finite ‖x‖"),
    *HISTOGRAM,
)  # fmt: skip


@dataclass(frozen=True)
class MatchStatistic(Statistic):
    """Match of input and pattern, by correlation and by cosine, against firing."""

    name = "match"
    version = 2
    COLUMNS = COLUMNS

    def primitives(self, site: Site) -> Mapping[str, Primitive]:
        """Bins and moments of both forms, firing and silent apart, and the mean length of the inputs."""
        return {"pearson": MatchBins("pearson"), "cosine": MatchBins("cosine"), "input": InputNorm()}

    def rows_together(self, site: Site) -> int:
        """All units: the bins of one form come before those of the other."""
        return site.units

    def columns(self, site: Site, state: State, controls: Controls) -> Rows:
        """One row per unit, and the bins that hold something: the reliability curve of firing against match."""
        neurons: dict[str, Values] = {"tau": _tau(site, part(state, "input"))}
        for form in FORMS:
            neurons |= {f"{form}_{name}": values for name, values in _of(part(state, form), site.fires).items()}
        return {"neurons": neurons, "histograms": _histograms(state, site.fires)}

    def define(self, site: Site, whole: Presentations, controls: Controls) -> Rows:
        """From the whole z and x, in NumPy."""
        return _definition(site, Whole(whole))


STATISTIC = MatchStatistic()


def _tau(site: Site, lengths: State) -> torch.Tensor:
    mean_G = lengths["mean"].masked_fill((lengths["n"] == 0) | (lengths["mean"] == 0), torch.nan)
    norm_U = site.scales.norm_U
    return -site.bias_U.double() / (norm_U.masked_fill(norm_U == 0, torch.nan) * mean_G[site.group_U])


def _of(state: State, fires: bool) -> dict[str, Values]:
    firing, silent = matchbins.moments_of(state, "fired"), matchbins.moments_of(state, "silent")
    both = merge_central(firing, silent)
    n_U = firing["n"] + silent["n"]
    fired_UB, silent_UB = (state[f"{name}_count"].long() for name in ("fired", "silent"))
    count_UB = fired_UB + silent_UB
    edges_UB = matchbins.edges(count_UB.device).expand(len(n_U), -1)
    columns: dict[str, Values] = {
        "n": n_U,
        "undefined": state["undefined"],
        "mean": both["mean"].clamp(-1, 1).masked_fill(n_U == 0, torch.nan),
        "std": (both["m2"] / n_U.double()).sqrt().clamp(max=1),
    }
    for name, at in QUANTILES.items():
        columns[name] = quantiles(count_UB, edges_UB[:, :-1], edges_UB[:, 1:], at)
    if not fires:
        return columns
    columns["firing_mean"] = firing["mean"].clamp(-1, 1).masked_fill(firing["n"] == 0, torch.nan)
    columns["silent_mean"] = silent["mean"].clamp(-1, 1).masked_fill(silent["n"] == 0, torch.nan)
    return columns | _prediction(fired_UB, silent_UB)


def _prediction(fired_UB: torch.Tensor, silent_UB: torch.Tensor) -> dict[str, Values]:
    """AUROC with its bound, and where P(fires) crosses one half."""
    p_UB = fired_UB / fired_UB.sum(1, keepdim=True).double()
    q_UB = silent_UB / silent_UB.sum(1, keepdim=True).double()
    tied_U = (p_UB * q_UB).sum(1) / 2
    below_UB = q_UB.cumsum(1) - q_UB
    return {
        "auroc": ((p_UB * below_UB).sum(1) + tied_U).clamp(0, 1),
        "auroc_bound": tied_U,
        "half": _half(fired_UB, silent_UB),
    }


def _half(fired_UB: torch.Tensor, silent_UB: torch.Tensor) -> torch.Tensor:
    # errors of "fires above this edge" for every edge, the outermost ones included
    missed_UE = torch.nn.functional.pad(fired_UB.cumsum(1), (1, 0))
    false_UE = silent_UB.sum(1, keepdim=True) - torch.nn.functional.pad(silent_UB.cumsum(1), (1, 0))
    wrong_UE = missed_UE + false_UE
    best_UE = wrong_UE == wrong_UE.amin(1, keepdim=True)
    edges_E = matchbins.edges(fired_UB.device)
    first_U = edges_E[best_UE.int().argmax(1)]
    last_U = edges_E[best_UE.shape[1] - 1 - best_UE.flip(1).int().argmax(1)]
    return ((first_U + last_U) / 2).masked_fill(best_UE[:, 0] | best_UE[:, -1], torch.nan)


def _histograms(state: State, fires: bool) -> dict[str, Values]:
    edges_E = matchbins.edges()
    found: dict[str, list[Any]] = {name: [] for name in ("unit", "bin", "low", "high", "count", "fired")}
    quantity: list[str] = []
    for form in FORMS:
        one = part(state, form)
        fired_UB = one["fired_count"].long()
        count_UB = fired_UB + one["silent_count"]
        unit, column = count_UB.nonzero(as_tuple=True)
        number = torch.where(column < matchbins.SIDE, column - matchbins.SIDE, column - matchbins.SIDE + 1)
        values = (unit, number, edges_E[column], edges_E[column + 1], count_UB[unit, column])
        for name, value in zip(found, (*values, fired_UB[unit, column]), strict=True):
            found[name].append(value)
        quantity += [form] * len(unit)
    rows: dict[str, Values] = {name: torch.cat(parts) for name, parts in found.items() if fires or name != "fired"}
    return rows | {"quantity": quantity}


def _definition(site: Site, whole: Whole) -> Rows:
    neurons: dict[str, list[Any]] = {}
    histogram: dict[str, list[Any]] = {}
    pattern_UD, bias_U = site.pattern_UD.numpy(), site.bias_U.numpy()
    for unit in range(site.units):
        valid = whole.valid_PU[:, unit]
        x_PD = whole.x_PGD[:, unit // (site.units // site.groups)]
        with np.errstate(invalid="ignore", over="ignore"):
            norm_P = np.sqrt((x_PD * x_PD).sum(1))
        mean_norm = norm_P[np.isfinite(norm_P)].mean() if np.isfinite(norm_P).any() else 0.0
        length = mean_norm * np.linalg.norm(pattern_UD[unit])
        one: dict[str, Any] = {"tau": -bias_U[unit] / length if length else np.nan}
        for form in FORMS:
            match, defined = _define_match(form, whole.affine_PU[:, unit] - bias_U[unit], x_PD, pattern_UD[unit])
            kept = valid & defined
            found, bins = _define_form(match[kept], whole.z_PU[kept, unit] > 0, site.fires)
            one |= {f"{form}_{name}": value for name, value in found.items()}
            one[f"{form}_undefined"] = int((valid & ~defined).sum())
            bins |= {"unit": [unit] * len(bins["bin"]), "quantity": [form] * len(bins["bin"])}
            for name, values in bins.items():
                histogram.setdefault(name, []).extend(values)
        for name, value in one.items():
            neurons.setdefault(name, []).append(value)
    quantity = histogram.pop("quantity")
    rows: dict[str, Values] = {name: torch.as_tensor(np.array(values)) for name, values in histogram.items()}
    columns = {name: torch.as_tensor(np.array(values)) for name, values in neurons.items()}
    return {"neurons": columns, "histograms": rows | {"quantity": quantity}}


def _define_match(form: Form, product_P: Array, x_PD: Array, w_D: Array) -> tuple[Array, Array]:
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        square_P, w_square = (x_PD * x_PD).sum(1), w_D @ w_D
        if form == "cosine":
            match_P = product_P / np.sqrt(square_P) / np.sqrt(w_square)
            defined_P = (square_P > 0) & bool(w_square > 0)
        else:
            x_rest_PD, w_rest_D = x_PD - x_PD.mean(1, keepdims=True), w_D - w_D.mean()
            spread_P, w_spread = (x_rest_PD**2).sum(1), w_rest_D @ w_rest_D
            numerator_P = product_P - w_D.mean() * x_PD.sum(1)
            match_P = numerator_P / np.sqrt(spread_P) / np.sqrt(w_spread)
            varied = len(w_D) >= 3 and w_spread > 2.0**-40 * w_square
            defined_P = (spread_P > 2.0**-40 * square_P) & varied
        return np.clip(match_P, -1, 1), defined_P & np.isfinite(square_P) & np.isfinite(match_P)


def _define_form(match: Array, fired: Array, fires: bool) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    side = np.array([0.0] + [2.0**e * (1 + m / 8) for e in range(-12, 0) for m in range(8)])
    # rising edges of the bins [low, high): those of negative matches are closed above
    place = np.searchsorted(side, np.abs(match), side="right")
    number = np.where(match < 0, -place, place)
    top = np.append(side, 1.0)
    n, n_fired, nan = len(match), int(fired.sum()), np.nan
    some = n > 0
    one: dict[str, Any] = {"n": n, "mean": match.mean() if some else nan, "std": match.std() if some else nan}
    for name, at in QUANTILES.items():
        one[name] = _define_quantile(number, top, at) if some else nan
    bins: dict[str, list[Any]] = {name: [] for name in ("bin", "low", "high", "count", "fired")}
    for bin_ in np.unique(number).tolist():
        low, high = sorted([np.sign(bin_) * top[abs(bin_) - 1], np.sign(bin_) * top[abs(bin_)]])
        inside = number == bin_
        for name, value in zip(bins, (bin_, low, high, int(inside.sum()), int(fired[inside].sum())), strict=True):
            bins[name].append(value)
    if not fires:
        del bins["fired"]
        return one, bins
    one["firing_mean"] = match[fired].mean() if n_fired else nan
    one["silent_mean"] = match[~fired].mean() if n_fired < n else nan
    both = 0 < n_fired < n
    ours, theirs = number[fired][:, None], number[~fired][None, :]
    one["auroc"] = ((ours > theirs) + 0.5 * (ours == theirs)).mean() if both else nan
    one["auroc_bound"] = 0.5 * (ours == theirs).mean() if both else nan
    one["half"] = _define_half(number, fired, top) if both else nan
    return one, bins


def _define_quantile(number: Array, top: Array, at: float) -> float:
    rank = max(int(np.ceil(at * len(number))), 1)
    bin_ = int(np.sort(number)[rank - 1])
    low, high = sorted([np.sign(bin_) * top[abs(bin_) - 1], np.sign(bin_) * top[abs(bin_)]])
    return float(low + (high - low) * (rank - (number < bin_).sum() - 0.5) / (number == bin_).sum())


def _define_half(number: Array, fired: Array, top: Array) -> float:
    numbers = [one for one in range(1 - len(top), len(top)) if one]
    edges = [-1.0, *(top[one] if one > 0 else -top[-one - 1] for one in numbers)]
    wrong = [(fired & (number <= below)).sum() + (~fired & (number > below)).sum() for below in [-len(top), *numbers]]
    best = [index for index, count in enumerate(wrong) if count == min(wrong)]
    if best[0] == 0 or best[-1] == len(wrong) - 1:
        return float("nan")
    return float((edges[best[0]] + edges[best[-1]]) / 2)
