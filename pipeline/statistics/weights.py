"""weights: what a unit's pattern is like by itself, without any data.

Layer 2: pure torch, no I/O. Its state is empty: everything is in the site, and in the untrained twin's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from pipeline.columns import Column
from pipeline.kernels.base import Primitive, State
from pipeline.kernels.vectors import TIE, cosine, cosine_blocks
from pipeline.sites import Presentations, Site
from pipeline.statistics.base import Controls, Nullable, Rows, Statistic, Values


def _column(
    name: str, meaning: str, formula: str, *, unit: str = "1", range: str = "any", null: str = "never"
) -> Column:
    return Column(name, "float64", meaning, unit=unit, range=range, null=null, formula=formula)


_ALONE = "null where the unit shares its inputs with no other, or has a single input"
_TWIN = "null where the model has no untrained twin, or was loaded: its twin began with other weights"


@dataclass(frozen=True)
class Weights(Statistic):
    """Norm, moments, nearest other pattern, distance from initialisation and effective fan-in of each pattern."""

    name: ClassVar[str] = "weights"
    version: ClassVar[int] = 1
    COLUMNS: ClassVar[tuple[Column, ...]] = (
        _column("weight_norm", "Length of the unit's pattern, norms folded in.", "‖w‖", unit="z per x", range="≥ 0"),
        _column("bias", "The unit's effective bias.", "b", unit="z"),
        _column("weight_mean", "Mean of the pattern's entries.", "μ = Σw_i/D", unit="z per x"),
        _column(
            "weight_std",
            "Standard deviation of the pattern's entries.",
            "σ = √(Σ(w_i − μ)²/D)",
            unit="z per x",
            range="≥ 0",
        ),
        _column(
            "weight_skewness",
            "Skewness of the pattern's entries; 0 if symmetric.",
            "Σ(w_i − μ)³/(Dσ³)",
            null="NaN where all entries are equal",
        ),
        _column(
            "weight_kurtosis",
            "Excess kurtosis of the pattern's entries: 0 if Gaussian, −1.2 if uniform, large if few entries matter.",
            "Σ(w_i − μ)⁴/(Dσ⁴) − 3",
            range="≥ −2",
            null="NaN where all entries are equal",
        ),
        Column(
            "neighbour_unit",
            "int64",
            "The unit of the site, over the same inputs, whose pattern points most nearly the same way.",
            unit="unit",
            range="≥ 0",
            null=f"{_ALONE}, or where no cosine is defined",
            formula="argmax over v ≠ u of cos(w_u, w_v), the lowest of equals",
        ),
        _column(
            "neighbour_cos",
            "Cosine with that nearest pattern; near 1 means a near-twin.",
            "max over v ≠ u of cos(w_u, w_v)",
            range="[-1, 1]",
            null=f"{_ALONE}; NaN where no cosine is defined",
        ),
        _column(
            "twin_cos",
            "Cosine of the pattern with the same unit's in the untrained twin; 1 if training never turned it.",
            "cos(w, w_init)",
            range="[-1, 1]",
            null=f"{_TWIN}; NaN where either pattern is 0",
        ),
        _column(
            "twin_distance",
            "Distance of the pattern from the same unit's in the untrained twin.",
            "‖w − w_init‖",
            unit="z per x",
            range="≥ 0",
            null=_TWIN,
        ),
        _column(
            "effective_fan_in",
            "How many inputs carry the pattern: D if all equally, 1 if a single one.",
            "(Σw²)²/Σw⁴",
            unit="inputs",
            range="[1, fan_in]",
            null="NaN where w = 0",
        ),
    )

    def primitives(self, site: Site) -> Mapping[str, Primitive]:
        """None: no data is needed."""
        return {}

    def columns(self, site: Site, state: State, controls: Controls) -> Rows:
        """The columns of every unit from the site's patterns."""
        w_UD = site.pattern_UD
        neurons: dict[str, Values] = {
            "weight_norm": w_UD.norm(dim=-1),
            "bias": site.bias_U,
            **_moments(w_UD),
            "effective_fan_in": _effective_fan_in(w_UD),
            **_neighbours(site),
        }
        if controls.twin is not None:
            neurons["twin_cos"] = cosine(w_UD, controls.twin.pattern_UD)
            neurons["twin_distance"] = (w_UD - controls.twin.pattern_UD).norm(dim=-1)
        return {"neurons": neurons}

    def define(self, site: Site, whole: Presentations, controls: Controls) -> Rows:
        """The same of each unit in turn, by its formula."""
        twin = controls.twin
        values = [_defined(site, unit, None if twin is None else twin.pattern_UD[unit]) for unit in range(site.units)]
        numbers = {name: torch.tensor([one[name] for one in values], dtype=torch.float64) for name in values[0]}
        neurons: dict[str, Values] = dict(numbers)
        if "neighbour_unit" in numbers:
            known_U = ~numbers["neighbour_cos"].isnan()
            neurons["neighbour_unit"] = Nullable(numbers["neighbour_unit"].long(), known_U)
        return {"neurons": neurons}


def _moments(w_UD: torch.Tensor) -> dict[str, Values]:
    mean_U1 = w_UD.mean(-1, keepdim=True)
    rest_UD = w_UD - mean_U1
    # a sum of equal entries may not divide back to them: below this, the spread is rounding
    flat_U = rest_UD.abs().amax(-1) <= 2.0**-50 * w_UD.abs().amax(-1)
    std_U = torch.where(flat_U, 0.0, rest_UD.square().mean(-1).sqrt())
    standard_UD = rest_UD / std_U[:, None]
    return {
        "weight_mean": mean_U1[:, 0],
        "weight_std": std_U,
        "weight_skewness": torch.where(flat_U, torch.nan, standard_UD.pow(3).mean(-1)),
        "weight_kurtosis": torch.where(flat_U, torch.nan, standard_UD.pow(4).mean(-1) - 3).clamp(min=-2),
    }


def _effective_fan_in(w_UD: torch.Tensor) -> torch.Tensor:
    # scaled to a largest entry of 1, or the fourth power of small weights would vanish
    square_UD = (w_UD / w_UD.abs().amax(-1, keepdim=True)).square()
    return (square_UD.sum(-1).square() / square_UD.square().sum(-1)).clamp(1, w_UD.shape[1])


def _neighbours(site: Site) -> dict[str, Values]:
    if site.units == site.groups or site.fan_in == 1:
        return {}
    units = site.units // site.groups
    pattern_GuD = site.pattern_UD.view(site.groups, -1, site.fan_in)
    cos_U = torch.full((site.units,), torch.nan, dtype=torch.float64)
    neighbour_U = torch.zeros(site.units, dtype=torch.int64)
    for block, cosines in cosine_blocks(pattern_GuD, pattern_GuD):
        known = cosines.nan_to_num(nan=-torch.inf)
        best, _ = known.max(-1)
        first = (known >= best[:, None] - TIE).to(torch.int8).argmax(-1)
        cos_U[block] = torch.where(best.isfinite(), best, torch.nan)
        neighbour_U[block] = first + block.start // units * units
    return {"neighbour_cos": cos_U, "neighbour_unit": Nullable(neighbour_U, cos_U.isfinite())}


def _defined(site: Site, unit: int, initial: torch.Tensor | None) -> dict[str, float]:
    w = site.pattern_UD[unit].tolist()
    mean = math.fsum(w) / len(w)
    flat = all(entry == w[0] for entry in w)
    moments = [0.0 if flat else math.fsum((entry - mean) ** power for entry in w) / len(w) for power in (2, 3, 4)]
    squares = [(entry / (max(map(abs, w)) or 1.0)) ** 2 for entry in w]
    fourth = math.fsum(square**2 for square in squares)
    values = {
        "weight_norm": math.hypot(*w),
        "bias": float(site.bias_U[unit]),
        "weight_mean": mean,
        "weight_std": math.sqrt(moments[0]),
        "weight_skewness": math.nan if flat else moments[1] / moments[0] ** 1.5,
        "weight_kurtosis": math.nan if flat else moments[2] / moments[0] ** 2 - 3,
        "effective_fan_in": math.fsum(squares) ** 2 / fourth if fourth else math.nan,
    }
    others = [v for v in range(site.units) if v != unit and site.group_U[v] == site.group_U[unit]]
    if others and site.fan_in > 1:
        cosines = {v: _angle(w, site.pattern_UD[v].tolist()) for v in others}
        best = max((value for value in cosines.values() if not math.isnan(value)), default=math.nan)
        values["neighbour_cos"] = best
        values["neighbour_unit"] = next((v for v in others if cosines[v] >= best - TIE), 0)
    if initial is not None:
        values["twin_cos"] = _angle(w, initial.tolist())
        values["twin_distance"] = math.dist(w, initial.tolist())
    return values


def _angle(left: list[float], right: list[float]) -> float:
    norms = math.hypot(*left) * math.hypot(*right)
    return math.fsum(one * other for one, other in zip(left, right, strict=True)) / norms if norms else math.nan


STATISTIC = Weights()
