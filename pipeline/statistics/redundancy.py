"""redundancy: which other unit of the site says the same, and how many dimensions the site really has.

Layer 2: pure torch, no I/O. Each pair of units is held once; in sites of more than `largest` + 1 units every unit is
compared with `largest` others spread evenly over the site, and the columns say with how many.

Shapes: U units in the order of the circle (see `kernels/pairs.py`), M what one is compared with, itself first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from pipeline.columns import Column
from pipeline.kernels.base import Primitive, State
from pipeline.kernels.pairs import UnitPairs, circle
from pipeline.kernels.whole import Array, Whole
from pipeline.sites import Presentations, Site
from pipeline.statistics.base import Controls, Nullable, Rows, Statistic, Values, at_least, part

# correlations that differ by less are equal: products are taken in float32
TIE = 2.0**-18
_BAD = (
    "NaN where a of the unit does not vary, its z or a is not finite somewhere, in fewer than 3 presentations, or "
    "where redundancy_compared = 0"
)


@dataclass(frozen=True)
class Redundancy(Statistic):
    """Correlation and joint firing of the units of a site.

    largest   how many units each is compared with at most (an odd number as one less); the state of a unit has 6 bytes
              for each, 3 kB in all
    """

    sample_rows: int | None = 20_000
    largest: int = at_least(2, 512)

    name: ClassVar[str] = "redundancy"
    version: ClassVar[int] = 4
    COLUMNS: ClassVar[tuple[Column, ...]] = (
        Column(
            "redundancy_n",
            "int64",
            "Presentations that the redundancy columns rest on (of the sample; unmasked; finite of some unit).",
            unit="presentations",
            range="≥ 0",
            formula="#(z and a of some unit finite)",
        ),
        Column(
            "redundancy_compared",
            "int64",
            "How many other units of the site this one was compared with: all, or as many as `largest` allows.",
            unit="units",
            range="≥ 0",
            formula="#(v ≠ u among the compared whose a varies, z and a finite); 0 where the unit's own is not so",
        ),
        Column(
            "redundancy_unit",
            "int64",
            "The unit of the site whose activation is most strongly correlated with this one's, of either sign.",
            unit="unit",
            range="≥ 0",
            null="null where redundancy_compared = 0",
            formula=f"argmax over the compared of |r_uv|, the lowest of those within {TIE:.0e}",
        ),
        Column(
            "redundancy_r",
            "float64",
            "Correlation of the activations of the two over presentations; near ±1 means that one is redundant.",
            range="[-1, 1]",
            null=_BAD,
            formula="r_uv = Cov(a_u, a_v) / (sd(a_u) sd(a_v)) of that unit",
            se=True,
        ),
        Column(
            "redundancy_lift",
            "float64",
            "How many times more often the two fire together than if independently.",
            range="≥ 0",
            null="null where firing is undefined (no gate); NaN where either never fires or r is NaN",
            formula="P(both fire) / (P(u fires) P(v fires)) of that unit",
        ),
        Column(
            "redundancy_dimension",
            "float64",
            "Effective dimension of the whole site's activations, the same for all its units: how many of equal "
            "variance would be as spread.",
            unit="dimensions",
            range="[1, units]",
            null="NaN where no unit varies, in fewer than 3 presentations",
            formula="participation ratio (tr C)² / ‖C‖² of C = Cov(a) of the units that vary and are finite; where not "
            "all are compared, Σ_v≠u C_uv² is taken as Σ_compared C_uv² · Σ_v≠u C_vv / Σ_compared C_vv",
            source="Gao et al. 2017, bioRxiv 214262",
        ),
    )

    def primitives(self, site: Site) -> Mapping[str, Primitive]:
        """Co-moments and joint firing of pairs."""
        return {"pairs": UnitPairs(self.largest, fired=site.fires)}

    def columns(self, site: Site, state: State, controls: Controls) -> Rows:
        """The most correlated other unit, and the site's effective dimension."""
        pairs, unit_U = part(state, "pairs"), circle(site, self.largest)
        known_U = (pairs["bad_U"] == 0) & (pairs["m2_U"] > 0) & (pairs["n_1"] >= 3)
        place_UM = _compared(site.units, pairs["co_UK"].shape[1])
        others_UM = known_U[:, None] & known_U[place_UM] & (place_UM != torch.arange(site.units)[:, None])
        # the root of each, since the product of two small ones would vanish
        scale_U = pairs["m2_U"].sqrt()
        r_UM = (_both_ways(pairs["co_UK"]) / scale_U[:, None] / scale_U[place_UM]).clamp(-1, 1)
        rank_UM = torch.where(others_UM, (r_UM.abs() / TIE).round(), -1.0)
        best_UM = rank_UM == rank_UM.amax(1, keepdim=True)
        best_U = torch.where(best_UM, unit_U[place_UM], site.units).argmin(1)
        partner_U, found_U = _at(place_UM, best_U), others_UM.any(1)
        columns: dict[str, torch.Tensor] = {
            "redundancy_n": pairs["n_1"].expand(site.units),
            "redundancy_compared": others_UM.sum(1),
            "redundancy_unit": unit_U[partner_U],
            "redundancy_r": torch.where(found_U, _at(r_UM, best_U), torch.nan),
            "redundancy_dimension": _dimension(_both_ways(pairs["co_UK"]), pairs["m2_U"], place_UM, known_U, others_UM),
        }
        if site.fires:
            fired_U, both_U = pairs["fired_U"].double(), _at(_both_ways(pairs["both_UK"]), best_U)
            lift_U = pairs["n_1"] * both_U / (fired_U * fired_U[partner_U])
            columns["redundancy_lift"] = torch.where(found_U, lift_U, torch.nan)
        # from the order of the circle to that of the units
        place_U = unit_U.argsort()
        neurons: dict[str, Values] = {name: value_U[place_U] for name, value_U in columns.items()}
        neurons["redundancy_unit"] = Nullable(columns["redundancy_unit"][place_U], found_U[place_U])
        return {"neurons": neurons}

    def define(self, site: Site, whole: Presentations, controls: Controls) -> Rows:
        """Correlations of all presentations at once, pair by pair in float64."""
        seen = Whole(whole)
        some_P = seen.valid_PU.any(1)
        z_PU, a_PU, valid_PU = seen.z_PU[some_P], seen.a_PU[some_P], seen.valid_PU[some_P]
        n = len(z_PU)
        varies = [bool(valid_PU[:, u].all() and n >= 3 and np.ptp(a_PU[:, u]) > 0) for u in range(site.units)]
        known = np.flatnonzero(varies)
        compared = [[k for k in _defined_others(site.units, self.largest, u) if k in known] for u in range(site.units)]
        compared = [others if varies[u] else [] for u, others in enumerate(compared)]
        pairs = [_defined_pair(z_PU, a_PU, u, others) for u, others in enumerate(compared)]
        neurons: dict[str, Values] = {
            "redundancy_n": torch.full((site.units,), n),
            "redundancy_compared": torch.tensor([len(others) for others in compared]),
            "redundancy_unit": Nullable(
                torch.tensor([pair[0] for pair in pairs]), torch.tensor([bool(others) for others in compared])
            ),
            "redundancy_r": torch.tensor([pair[1] for pair in pairs], dtype=torch.float64),
            "redundancy_dimension": torch.full((site.units,), _defined_dimension(a_PU, known, compared)).double(),
        }
        if site.fires:
            neurons["redundancy_lift"] = torch.tensor([pair[2] for pair in pairs], dtype=torch.float64)
        return {"neurons": neurons}


def _compared(units: int, count: int) -> torch.Tensor:
    """The places of the circle that each is compared with, (U, 2K + 1): itself, those behind it, those before it.

    A place that is both behind and before stands for itself in place of the second.
    """
    place_U1, step_K = torch.arange(units)[:, None], torch.arange(1, count + 1)
    before_UK = torch.where(2 * step_K == units, place_U1, place_U1 - step_K)
    return torch.cat([place_U1, place_U1 + step_K, before_UK], 1) % max(units, 1)


def _both_ways(value_UK: torch.Tensor) -> torch.Tensor:
    """What is known of each unit and those behind it, for all that it is compared with, (U, 2K + 1); 0 with itself."""
    units, count = value_UK.shape
    step_K = torch.arange(1, count + 1)
    before_UK = value_UK.gather(0, (torch.arange(units)[:, None] - step_K) % max(units, 1))
    return torch.cat([value_UK.new_zeros((units, 1)), value_UK, before_UK], 1)


def _at(value_UM: torch.Tensor, index_U: torch.Tensor) -> torch.Tensor:
    return value_UM.gather(1, index_U[:, None])[:, 0]


def _dimension(
    co_UM: torch.Tensor, m2_U: torch.Tensor, place_UM: torch.Tensor, known_U: torch.Tensor, others_UM: torch.Tensor
) -> torch.Tensor:
    """(tr C)² / ‖C‖² of the known units; what was not compared counts by variance like what was: ≥ 1."""
    if not bool(known_U.any()):
        return torch.full_like(m2_U, torch.nan)
    largest = m2_U[known_U].max()
    own_U = torch.where(known_U, m2_U / largest, 0.0)
    compared_U = torch.where(others_UM, own_U[place_UM], 0.0).sum(1)
    square_U = torch.where(others_UM, co_UM / largest, 0.0).square().sum(1)
    # a mean of squares that knows no variances can exceed (tr C)², where those compared vary most
    everyone_U = torch.where(compared_U > 0, (own_U.sum() - own_U) / compared_U, 0.0)
    total = own_U.square().sum() + (square_U * everyone_U).sum()
    # float32 products leave one signal a little less than one dimension
    return (own_U.sum().square() / total).clamp(1, len(m2_U)).expand_as(m2_U).clone()


def _defined_others(units: int, largest: int, unit: int) -> list[int]:
    """All other units, or those up to half of `largest` steps away, of a step without common factor near 0.618 U."""
    most = largest // 2
    if units <= 2 * most + 1:
        return [other for other in range(units) if other != unit]
    coprime = [step for step in range(1, units) if math.gcd(step, units) == 1]
    step = sorted((abs(one - (5**0.5 - 1) / 2 * units), one) for one in coprime)[0][1]
    return sorted({(unit + sign * k * step) % units for k in range(1, most + 1) for sign in (-1, 1)} - {unit})


def _defined_pair(z_PU: Array, a_PU: Array, unit: int, others: list[int]) -> tuple[int, float, float]:
    if not others:
        return 0, np.nan, np.nan
    correlations = [float(_correlation(a_PU[:, unit], a_PU[:, other])) for other in others]
    ranks = [round(abs(r) / TIE) for r in correlations]
    best = ranks.index(max(ranks))
    fires, other_fires = z_PU[:, unit] > 0, z_PU[:, others[best]] > 0
    chance = fires.mean() * other_fires.mean()
    lift = float((fires & other_fires).mean() / chance) if chance else np.nan
    return others[best], correlations[best], lift


def _correlation(left: Array, right: Array) -> Array:
    left, right = (value / np.abs(value).max() for value in (left - left.mean(), right - right.mean()))
    return np.asarray(left @ right / np.sqrt(left @ left) / np.sqrt(right @ right))


def _defined_dimension(a_PU: Array, known: Array, compared: list[list[int]]) -> float:
    if not len(known):
        return np.nan
    a_PU = a_PU[:, known] / np.abs(a_PU[:, known]).max()
    cov = np.atleast_2d(np.cov(a_PU.T, bias=True))
    square = 0.0
    for i, u in enumerate(known):
        others = [int(np.flatnonzero(known == k)[0]) for k in compared[u]]
        compared_variance = sum(cov[k, k] for k in others)
        square += cov[i, i] ** 2
        if compared_variance:
            square += sum(cov[i, k] ** 2 for k in others) * ((np.trace(cov) - cov[i, i]) / compared_variance)
    return float(np.trace(cov) ** 2 / square)


STATISTIC = Redundancy()
