"""How a unit responds: moments, quantiles and histogram of z, how often it fires, moments and sparsity of a.

Layer 2: pure torch; imports `base`, `kernels` and what is below. Presentations at which z or a is NaN or infinite are
counted in n_nonfinite and are part of nothing else. Behind gate "identity" nothing about firing exists.

Shapes: P presentations, U units, B bins.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pipeline.columns import Column
from pipeline.kernels import bins
from pipeline.kernels.base import Primitive, State
from pipeline.kernels.bins import Bins
from pipeline.kernels.firing import Firing
from pipeline.kernels.moments import Moments
from pipeline.kernels.whole import Array, Whole
from pipeline.sites import Presentations, Site
from pipeline.statistics.base import HISTOGRAM, Controls, Nullable, Rows, Statistic, Values, part

QUANTILES = {
    "q001": 0.001,
    "q01": 0.01,
    "q05": 0.05,
    "q25": 0.25,
    "q50": 0.5,
    "q75": 0.75,
    "q95": 0.95,
    "q99": 0.99,
    "q999": 0.999,
}
# Hanley & Lippman-Hand 1983: none in n bounds the rate below 3/n at 95 %
RULE_OF_THREE = 3.0

_NO_DATA = "NaN where n = 0"
_CONSTANT = "NaN where n = 0 or all values are equal"
_FIRING = "null where the gate is no nonlinearity; NaN where n = 0"
_TREVES = "Treves & Rolls 1991"


def _quantile_column(name: str, at: float) -> Column:
    return Column(
        f"z_{name}",
        "float64",
        f"Value below which about {at:.1%} of z lie, read from the histogram.",
        unit="z",
        range="[z_min, z_max]",
        null=_NO_DATA,
        formula=f"value of rank ⌈{at}·n⌉, placed evenly in its bin; off by < 25 % of itself or 2⁻¹³·max|z|",
    )


COLUMNS = (
    Column("n", "int64", "Presentations that count: not masked, z and a finite.", "presentations", "≥ 0",
           formula="#(z and a finite)"),
    Column("n_fired", "int64", "Presentations at which the unit fires.", "presentations", "[0, n]",
           "null where the gate is no nonlinearity", "#(z > 0)"),
    Column("n_zero", "int64", "Presentations at which z is exactly 0.", "presentations", "[0, n]", formula="#(z = 0)"),
    Column("n_nonfinite", "int64", "Unmasked presentations left out because z or a is NaN or infinite.",
           "presentations", "≥ 0", formula="#(z or a not finite)"),
    Column("z_mean", "float64", "Mean of z.", "z", null=_NO_DATA, formula="Σz/n", se=True),
    Column("z_std", "float64", "Standard deviation of z.", "z", "≥ 0", _NO_DATA, "√(Σ(z−z̄)²/n)", se=True),
    Column("z_skewness", "float64", "Skewness of z: 0 for a symmetric distribution.", null=_CONSTANT,
           formula="√n·M3/M2^1.5, M_p = Σ(z−z̄)^p", source="Pébay 2008"),
    Column("z_kurtosis", "float64", "Excess kurtosis of z: 0 for a Gaussian.", range="≥ −2", null=_CONSTANT,
           formula="n·M4/M2² − 3", source="Pébay 2008"),
    Column("z_min", "float64", "Smallest z.", "z", null=_NO_DATA, formula="min z"),
    Column("z_max", "float64", "Greatest z.", "z", null=_NO_DATA, formula="max z"),
    *(_quantile_column(name, at) for name, at in QUANTILES.items()),
    Column("fire_rate", "float64", "Share of presentations at which the unit fires.", "1", "[0, 1]", _FIRING,
           "n_fired/n", se=True),
    Column("row_fire_rate", "float64", "Share of rows in which the unit fires at some position.", "1", "[0, 1]",
           _FIRING, "#(rows with z > 0 anywhere)/#(rows with n > 0)", se=True),
    Column("a_mean", "float64", "Mean of the gate's output.", "a", null=_NO_DATA, formula="Σa/n", se=True),
    Column("a_std", "float64", "Standard deviation of the gate's output.", "a", "≥ 0", _NO_DATA, "√(Σ(a−ā)²/n)"),
    Column("a_skewness", "float64", "Skewness of the gate's output.", null=_CONSTANT,
           formula="√n·M3/M2^1.5, M_p = Σ(a−ā)^p", source="Pébay 2008"),
    Column("a_kurtosis", "float64", "Excess kurtosis of the gate's output.", range="≥ −2", null=_CONSTANT,
           formula="n·M4/M2² − 3", source="Pébay 2008"),
    Column("a_min", "float64", "Smallest output of the gate.", "a", null=_NO_DATA, formula="min a"),
    Column("a_max", "float64", "Greatest output of the gate.", "a", null=_NO_DATA, formula="max a"),
    Column("a_hoyer", "float64", "Hoyer sparsity of the output over presentations: 0 all equal, 1 a single one.", "1",
           "[0, 1]", "NaN where n < 2 or every a is 0", "(√n − Σ|a|/√Σa²)/(√n − 1)", "Hoyer 2004", se=True),
    Column("a_treves_rolls", "float64", "Treves–Rolls sparseness of the output: 1 dense, near 0 sparse.", "1", "[0, 1]",
           "NaN where n = 0 or every a is 0", "(Σ|a|/n)²/(Σa²/n)", _TREVES),
    Column("always_on", "bool", "Whether the unit fired at every presentation.", range="true, false",
           null="null where n = 0 or the gate is no nonlinearity", formula="n_fired = n"),
    Column("dead", "bool", "Whether the unit never fired.", range="true, false",
           null="null where n = 0 or the gate is no nonlinearity",
           formula="n_fired = 0"),
    Column("dead_bound", "float64", "Of a dead unit, the rate of firing that n silent presentations rule out at 95 %.",
           "1", "> 0", "null unless dead", "3/n", "Hanley & Lippman-Hand 1983"),
    *HISTOGRAM,
)  # fmt: skip


@dataclass(frozen=True)
class Response(Statistic):
    """Moments, quantiles, histogram and firing of every unit."""

    name = "response"
    version = 3
    COLUMNS = COLUMNS

    def primitives(self, site: Site) -> Mapping[str, Primitive]:
        """Counts, moments of z and of a to the fourth, the histogram of z."""
        return {"firing": Firing(), "z": Moments("z", 4), "a": Moments("a", 4), "bins": Bins()}

    def rows_together(self, site: Site) -> int:
        """Each unit alone."""
        return 1

    def columns(self, site: Site, state: State, controls: Controls) -> Rows:
        """One row per unit, and the bins that hold something."""
        neurons = {
            **_of_z(part(state, "z")),
            **_quantiles(part(state, "bins"), part(state, "z")),
            **_of_a(part(state, "a")),
            **_of_firing(part(state, "firing"), site.fires),
        }
        return {"neurons": neurons, "histograms": _histogram(part(state, "bins"), site.fires)}

    def define(self, site: Site, whole: Presentations, controls: Controls) -> Rows:
        """From the whole z and a, in NumPy."""
        return _definition(Whole(whole), site.fires)


STATISTIC = Response()


def _of_z(z: State) -> dict[str, Values]:
    n = z["n"].double()
    return {
        "n": z["n"],
        "z_mean": _where_any(n, z["mean"]),
        "z_std": _std(z),
        "z_skewness": _skewness(z),
        "z_kurtosis": _kurtosis(z),
        "z_min": _where_any(n, z["min"]),
        "z_max": _where_any(n, z["max"]),
    }


def _where_any(n_U: torch.Tensor, value_U: torch.Tensor) -> torch.Tensor:
    return value_U.masked_fill(n_U == 0, torch.nan)


def _std(moments: State) -> torch.Tensor:
    spread_U = (moments["m2"] / moments["n"].double()).sqrt()
    # what rounding leaves of equal numbers is no spread
    return _where_any(moments["n"], spread_U.masked_fill(moments["min"] == moments["max"], 0))


def _skewness(moments: State) -> torch.Tensor:
    n, m2 = moments["n"].double(), moments["m2"]
    return _where_varied(moments, n.sqrt() * moments["m3"] / m2.pow(1.5))


def _kurtosis(moments: State) -> torch.Tensor:
    # of two values that are equally frequent it is −2, and rounding would make it less
    kurtosis_U = moments["n"].double() * moments["m4"] / moments["m2"].square() - 3
    return _where_varied(moments, kurtosis_U.clamp(min=-2))


def _where_varied(moments: State, value_U: torch.Tensor) -> torch.Tensor:
    return value_U.masked_fill((moments["n"] == 0) | (moments["min"] == moments["max"]), torch.nan)


def _quantiles(histogram: State, z: State) -> dict[str, Values]:
    low_UB, high_UB = bins.bin_edges(histogram["top"])
    least_U1, greatest_U1 = z["min"][:, None], z["max"][:, None]
    low_UB, high_UB = (edge.clamp(min=least_U1).clamp(max=greatest_U1) for edge in (low_UB, high_UB))
    return {f"z_{name}": bins.quantiles(histogram["count"], low_UB, high_UB, at) for name, at in QUANTILES.items()}


def _of_a(a: State) -> dict[str, Values]:
    n = a["n"].double()
    square = a["m2"] + n * a["mean"].square()
    return {
        "a_mean": _where_any(n, a["mean"]),
        "a_std": _std(a),
        "a_skewness": _skewness(a),
        "a_kurtosis": _kurtosis(a),
        "a_min": _where_any(n, a["min"]),
        "a_max": _where_any(n, a["max"]),
        "a_hoyer": ((n.sqrt() - a["absolute"] / square.sqrt()) / (n.sqrt() - 1))
        .clamp(0, 1)
        .masked_fill(n < 2, torch.nan),
        "a_treves_rolls": ((a["absolute"] / n).square() / (square / n)).clamp(0, 1),
    }


def _of_firing(firing: State, fires: bool) -> dict[str, Values]:
    n, n_fired = firing["n"], firing["fired"]
    columns: dict[str, Values] = {"n_zero": firing["zero"], "n_nonfinite": firing["nonfinite"]}
    if not fires:
        return columns
    shown, dead = n > 0, (n > 0) & (n_fired == 0)
    # integers divide to float32
    n, rows = n.double(), firing["rows"].double()
    return columns | {
        "n_fired": n_fired,
        "fire_rate": n_fired / n,
        "row_fire_rate": firing["rows_fired"] / rows,
        "always_on": Nullable(n_fired == n, shown),
        "dead": Nullable(dead, shown),
        "dead_bound": Nullable(RULE_OF_THREE / n, dead),
    }


def _histogram(histogram: State, fires: bool) -> dict[str, Values]:
    unit, column = histogram["count"].nonzero(as_tuple=True)
    low_UB, high_UB = bins.bin_edges(histogram["top"])
    count = histogram["count"][unit, column].long()
    rows: dict[str, Values] = {
        "unit": unit,
        "quantity": ["z"] * len(unit),
        "bin": bins.bin_numbers(histogram["top"])[unit, column],
        "low": low_UB[unit, column],
        "high": high_UB[unit, column],
        "count": count,
    }
    return rows | {"fired": torch.where(column > bins.ZERO, count, 0)} if fires else rows


def _definition(whole: Whole, fires: bool) -> Rows:
    units = range(whole.z_PU.shape[1])
    kept = [whole.valid_PU[:, unit] for unit in units]
    found = [_define_unit(whole.z_PU[kept[u], u], whole.a_PU[kept[u], u], whole.row_P[kept[u]], fires) for u in units]
    neurons = {name: torch.as_tensor(np.array([one[name] for one in found])) for name in (found[0] if found else {})}
    columns: dict[str, Values] = dict(neurons)
    columns["n_nonfinite"] = torch.as_tensor((~whole.valid_PU).sum(0))
    if fires:
        shown = neurons["n"] > 0
        columns["always_on"] = Nullable(neurons["n_fired"] == neurons["n"], shown)
        columns["dead"] = Nullable(neurons["n_fired"] == 0, shown)
        columns["dead_bound"] = Nullable(3.0 / neurons["n"].double(), shown & (neurons["n_fired"] == 0))
    return {"neurons": columns, "histograms": _define_histogram(whole, kept, fires)}


def _define_unit(z: Array, a: Array, row: Array, fires: bool) -> dict[str, Any]:
    n, nan = len(z), np.nan
    some, varied, a_varied = n > 0, n > 0 and z.min() < z.max(), n > 0 and a.min() < a.max()
    rest, a_rest = (z - z.mean(), a - a.mean()) if some else (z, a)
    square = float((a * a).sum())
    one: dict[str, Any] = {
        "n": n,
        "n_zero": int((z == 0).sum()),
        "z_mean": z.mean() if some else nan,
        "z_std": (z.std() if varied else 0.0) if some else nan,
        "z_skewness": (rest**3).mean() / (rest**2).mean() ** 1.5 if varied else nan,
        "z_kurtosis": (rest**4).mean() / (rest**2).mean() ** 2 - 3 if varied else nan,
        "z_min": z.min() if some else nan,
        "z_max": z.max() if some else nan,
        "a_mean": a.mean() if some else nan,
        "a_std": (a.std() if a_varied else 0.0) if some else nan,
        "a_skewness": (a_rest**3).mean() / (a_rest**2).mean() ** 1.5 if a_varied else nan,
        "a_kurtosis": (a_rest**4).mean() / (a_rest**2).mean() ** 2 - 3 if a_varied else nan,
        "a_min": a.min() if some else nan,
        "a_max": a.max() if some else nan,
        "a_hoyer": (n**0.5 - np.abs(a).sum() / square**0.5) / (n**0.5 - 1) if n > 1 and square else nan,
        "a_treves_rolls": np.abs(a).mean() ** 2 / (square / n) if square else nan,
    }
    one |= {f"z_{name}": _define_quantile(z, at) for name, at in QUANTILES.items()}
    if fires:
        one["n_fired"] = int((z > 0).sum())
        one["fire_rate"] = (z > 0).mean() if some else nan
        one["row_fire_rate"] = len(np.unique(row[z > 0])) / len(np.unique(row)) if some else nan
    return one


_DEFINED_EDGES = np.array([2.0**e * (1 + m / 4) for e in range(-126, 1024) for m in range(4)] + [np.inf])


def _define_bin(z: Array, value: float) -> tuple[int, float, float, Array]:
    """Number and edges of the bin that holds a value, and which of z it holds."""
    if value == 0:
        return 0, 0.0, 0.0, z == 0
    every = _DEFINED_EDGES
    # the 14 octaves that end with the bin of the largest |z|, and one bin from there down to 0
    end = max(int(np.searchsorted(every, np.abs(z).max(), side="right")), 56)
    edges = np.concatenate([[0.0], every[end - 56 : end + 1]])
    index = int(np.searchsorted(edges, abs(value), side="right")) - 1
    inside = (np.sign(z) == np.sign(value)) & (np.abs(z) >= edges[index]) & (np.abs(z) < edges[index + 1])
    low, high = sorted([np.sign(value) * edges[index], np.sign(value) * edges[index + 1]])
    return int(np.sign(value)) * (end - 56 + index + 1), low, high, inside


def _define_quantile(z: Array, at: float) -> float:
    if len(z) == 0:
        return float("nan")
    rank = max(int(np.ceil(at * len(z))), 1)
    _, low, high, inside = _define_bin(z, float(np.sort(z)[rank - 1]))
    low, high = np.clip([low, high], z.min(), z.max())
    return float(low + (high - low) * (rank - (z < z[inside].min()).sum() - 0.5) / inside.sum())


def _define_histogram(whole: Whole, kept: list[Array], fires: bool) -> dict[str, Values]:
    rows: dict[str, list[Any]] = {name: [] for name in ("unit", "bin", "low", "high", "count", "fired")}
    for unit, valid in enumerate(kept):
        z = np.sort(whole.z_PU[valid, unit])
        while len(z):
            number, low, high, inside = _define_bin(whole.z_PU[valid, unit], float(z[0]))
            count = int(inside.sum())
            for name, value in zip(rows, (unit, number, low, high, count, count * int(z[0] > 0)), strict=True):
                rows[name].append(value)
            z = z[count:]
    found: dict[str, Values] = {"quantity": ["z"] * len(rows["unit"])}
    for name, values in rows.items():
        if fires or name != "fired":
            found[name] = torch.tensor(values, dtype=torch.float64 if name in ("low", "high") else torch.int64)
    return found
