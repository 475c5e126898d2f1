"""redundancy: which other unit of the site says the same, and how many dimensions the site really has.

Layer 2: pure torch, no I/O. Its state is U × K numbers for a site of U units, K = min(U, largest); in wider sites every
unit is compared with K others spread evenly over it, and the columns say with how many.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from pipeline.columns import Column
from pipeline.kernels.base import Primitive, State
from pipeline.kernels.pairs import UnitPairs, references
from pipeline.kernels.whole import Array, Whole
from pipeline.sites import Presentations, Site
from pipeline.statistics.base import Controls, Nullable, Rows, Statistic, Values, at_least, part

# correlations that differ by less are equal: products are taken in float32
TIE = 2.0**-18
_BAD = "NaN where a of the unit does not vary or is not finite somewhere, in fewer than 3 presentations"


@dataclass(frozen=True)
class Redundancy(Statistic):
    """Correlation and joint firing of the units of a site.

    largest   how many units each is compared with at most; the state of a unit has 16 bytes for each, 8 kB in all
    """

    sample_rows: int | None = 20_000
    largest: int = at_least(1, 508)

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
            formula="v ≠ u among the compared whose a varies and is finite",
        ),
        Column(
            "redundancy_unit",
            "int64",
            "The unit of the site whose activation is most strongly correlated with this one's, of either sign.",
            unit="unit",
            range="≥ 0",
            null="where no correlation is defined",
            formula=f"argmax over v ≠ u of |r_uv|, the lowest of those within {TIE:.0e}",
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
            null="NaN where no unit varies; where not all units are compared, Σ_v≠u C_uv² is estimated as "
            "Σ_compared C_uv² · Σ_v≠u C_vv / Σ_compared C_vv",
            formula="participation ratio (tr C)² / ‖C‖² of C = Cov(a)",
            source="Gao et al. 2017, bioRxiv 214262",
        ),
    )

    def primitives(self, site: Site) -> Mapping[str, Primitive]:
        """Co-moments and joint firing of pairs."""
        return {"pairs": UnitPairs(self.largest, fired=site.fires)}

    def columns(self, site: Site, state: State, controls: Controls) -> Rows:
        """The most correlated other unit, and the site's effective dimension."""
        pairs = part(state, "pairs")
        known_U = (pairs["bad_U"] == 0) & (pairs["m2_U"] > 0) & (pairs["n_1"] >= 3)
        reference_K = references(site, self.largest)
        others_UK = known_U[:, None] & known_U[reference_K] & (torch.arange(site.units)[:, None] != reference_K)
        # the root of each, since the product of two small ones would vanish
        scale_U = pairs["m2_U"].sqrt()
        r_UK = (pairs["co_UK"] / scale_U[:, None] / scale_U[reference_K]).clamp(-1, 1)
        rank_UK = torch.where(others_UK, (r_UK.abs() / TIE).round(), -1.0)
        best_U = (rank_UK == rank_UK.amax(1, keepdim=True)).to(torch.int8).argmax(1)
        found_U = others_UK.any(1)
        neurons: dict[str, Values] = {
            "redundancy_n": pairs["n_1"].expand(site.units).clone(),
            "redundancy_compared": others_UK.sum(1),
            "redundancy_unit": Nullable(reference_K[best_U], found_U),
            "redundancy_r": torch.where(found_U, _at(r_UK, best_U), torch.nan),
            "redundancy_dimension": _dimension(pairs["co_UK"], pairs["m2_U"], reference_K, known_U, others_UK),
        }
        if site.fires:
            fired_U = pairs["fired_U"].double()
            lift_U = pairs["n_1"] * _at(pairs["both_UK"], best_U) / (fired_U * fired_U[reference_K[best_U]])
            neurons["redundancy_lift"] = torch.where(found_U, lift_U, torch.nan)
        return {"neurons": neurons}

    def define(self, site: Site, whole: Presentations, controls: Controls) -> Rows:
        """Correlations of all presentations at once, pair by pair in float64."""
        seen = Whole(whole)
        some_P = seen.valid_PU.any(1)
        z_PU, a_PU, valid_PU = seen.z_PU[some_P], seen.a_PU[some_P], seen.valid_PU[some_P]
        n = len(z_PU)
        varies = [bool(valid_PU[:, u].all() and n >= 3 and np.ptp(a_PU[:, u]) > 0) for u in range(site.units)]
        known = np.flatnonzero(varies)
        count = min(site.units, self.largest)
        spread = [k * site.units // count for k in range(count)]
        compared = [[k for k in spread if k in known and k != u] for u in range(site.units)]
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


def _at(value_UK: torch.Tensor, index_U: torch.Tensor) -> torch.Tensor:
    return value_UK.gather(1, index_U[:, None])[:, 0]


def _dimension(
    co_UK: torch.Tensor, m2_U: torch.Tensor, reference_K: torch.Tensor, known_U: torch.Tensor, others_UK: torch.Tensor
) -> torch.Tensor:
    """(tr C)² / ‖C‖² of the known units; what was not compared counts by variance like what was: ≥ 1."""
    if not bool(known_U.any()):
        return torch.full_like(m2_U, torch.nan)
    largest = m2_U[known_U].max()
    own_U = torch.where(known_U, m2_U / largest, 0.0)
    compared_U = torch.where(others_UK, own_U[reference_K], 0.0).sum(1)
    square_U = torch.where(others_UK, co_UK / largest, 0.0).square().sum(1)
    # a mean of squares that knows no variances can exceed (tr C)², where those compared vary most
    everyone_U = torch.where(compared_U > 0, (own_U.sum() - own_U) / compared_U, 0.0)
    total = own_U.square().sum() + (square_U * everyone_U).sum()
    return (own_U.sum().square() / total).expand_as(m2_U).clone()


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
