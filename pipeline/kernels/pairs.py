"""Co-moments and joint firing of pairs of units of one site.

Layer 1: pure torch, no I/O. The units stand in a circle, each is paired with the K behind it, and every pair is there
for both of its units: half the numbers of a square. In a site of at most 2K + 1 units these are all pairs; in a wider
one each unit is compared with 2K others, and to spread them evenly over the site (units side by side are of one group,
or of one head) the circle takes every s-th unit, s near the golden section.

Shapes: U units in the order of the circle, K units behind one, P presentations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

from pipeline.kernels import bulk
from pipeline.kernels.base import Primitive, State
from pipeline.kernels.comoment import all_finite, as_float, centred, observe_slices, squares
from pipeline.kernels.counts import NARROW, added
from pipeline.kernels.thin import SLICE_NUMBERS
from pipeline.sites import Presentations, Site


def behind(site: Site, largest: int) -> int:
    """With how many units behind it each unit is paired, K: as compares it with `largest` others at most."""
    return min(site.units, largest) // 2


@lru_cache(maxsize=64)
def _circle(units: int, count: int) -> torch.Tensor:
    if 2 * count + 1 >= units:
        return torch.arange(units)
    golden = units * (math.sqrt(5) - 1) / 2
    step = min((one for one in range(1, units) if math.gcd(one, units) == 1), key=lambda one: abs(one - golden))
    return torch.arange(units) * step % units


def circle(site: Site, largest: int) -> torch.Tensor:
    """The number of the unit at each place of the circle, int64."""
    return _circle(site.units, behind(site, largest))


def of_behind(value_U: torch.Tensor, count: int) -> torch.Tensor:
    """A value of each of the units behind each, (U, K): a view of little memory, not to be written to."""
    round_V = torch.cat([value_U, value_U[:count]])
    return round_V.as_strided((len(value_U), count), (1, 1), 1)


def _products(value_PU: torch.Tensor, order_U: torch.Tensor | None, count: int) -> torch.Tensor:
    """Σ over the presentations of each unit's value times that of each unit behind it, (U, K) in the circle's order.

    `order_U` is the unit at each place, None where that is its number.
    """
    units = value_PU.shape[1]
    if order_U is None:
        round_PV = torch.cat([value_PU, value_PU[:, :count]], 1)
    else:
        round_PV = value_PU.index_select(1, torch.cat([order_U, order_U[:count]]))
    in_bulk = bulk.in_bulk(value_PU)
    found_UK = value_PU.new_empty((units, count), dtype=torch.float64 if in_bulk else None)
    for start in range(0, units, max(count, 1)):
        stop = min(start + count, units)
        left_uP, right_PV = round_PV[:, start:stop].mT, round_PV[:, start + 1 : stop + count]
        square = bulk.multiply(left_uP[None], right_PV[None])[0] if in_bulk else left_uP @ right_PV
        # of each row those behind it, one column further in the next
        found_UK[start:stop] = square.as_strided((stop - start, count), (square.shape[1] + 1, 1))
    return found_UK


@dataclass(frozen=True)
class UnitPairs(Primitive):
    """Σ(a_u − ā_u)(a_k − ā_k), and in how many presentations both fire, over the unmasked presentations of a site.

    Left out are presentations that no unit makes anything finite of: a row with a NaN. A unit with a value that is not
    finite at another one, of z or of a, is counted in `bad_U`: its other numbers mean nothing.

    n_1       int64, presentations
    bad_U     int64, those at which z or a of the unit is not finite
    mean_U, m2_U   mean of a and Σ(a − ā)²
    co_UK     co-moments with the units behind
    fired_U   int64, presentations with z > 0; both_UK, see `counts`, with z > 0 of both; only where `fired`
    """

    largest: int
    fired: bool = True

    def empty(self, site: Site) -> State:
        """Nothing seen."""
        units, count = site.units, behind(site, self.largest)
        state = {
            "n_1": torch.zeros(1, dtype=torch.int64),
            "bad_U": torch.zeros(units, dtype=torch.int64),
            "mean_U": torch.zeros(units, dtype=torch.float64),
            "m2_U": torch.zeros(units, dtype=torch.float64),
            "co_UK": torch.zeros((units, count), dtype=torch.float64),
        }
        if self.fired:
            state["fired_U"] = torch.zeros(units, dtype=torch.int64)
            state["both_UK"] = torch.zeros((units, count), dtype=NARROW)
        return state

    def observe(self, presentations: Presentations) -> State:
        """Merge the pairs of the batch's slices."""
        units = presentations.site.units
        # the pairs of so many units are more to merge than a small slice is to multiply
        numbers = max(SLICE_NUMBERS, units * behind(presentations.site, self.largest))
        return observe_slices(self, presentations, self._slice, width=units, numbers=numbers)

    def merge(self, left: State, right: State) -> State:
        """Chan's update of means and co-moments; counts add."""
        n_1 = left["n_1"] + right["n_1"]
        share_1 = right["n_1"].double() / n_1.clamp(min=1)
        step_U = right["mean_U"] - left["mean_U"]
        weighted_U = left["n_1"] * share_1 * step_U
        merged = {name: left[name] + right[name] for name in left if name != "both_UK"}
        if self.fired:
            merged["both_UK"] = added(left["both_UK"], right["both_UK"])
        step_UK = of_behind(step_U, left["co_UK"].shape[1])
        return merged | {
            "mean_U": left["mean_U"] + step_U * share_1,
            "m2_U": merged["m2_U"] + weighted_U * step_U,
            "co_UK": merged["co_UK"].addcmul_(weighted_U[:, None], step_UK),
        }

    def _slice(self, presentations: Presentations, start: int, stop: int) -> State:
        z_PU = presentations.z_LSU[start:stop].flatten(0, 1)
        a_PU = presentations.a_LSU[start:stop].flatten(0, 1)
        if presentations.mask_LS is not None:
            unmasked_P = presentations.mask_LS[start:stop].flatten()
            z_PU, a_PU = z_PU[unmasked_P], a_PU[unmasked_P]
        finite_1PU = None
        if not (all_finite(z_PU) and all_finite(a_PU)):
            finite_PU = z_PU.isfinite() & a_PU.isfinite()
            some_P = finite_PU.any(1)
            z_PU, a_PU, finite_1PU = z_PU[some_P], a_PU[some_P], finite_PU[some_P][None]
        if len(z_PU) == 0:
            return {name: value.to(z_PU.device) for name, value in self.empty(presentations.site).items()}
        count = behind(presentations.site, self.largest)
        order_U = circle(presentations.site, self.largest).to(z_PU.device)
        moved_U = order_U if 2 * count + 1 < len(order_U) else None
        a = centred(as_float(a_PU)[None], finite_1PU)
        scale_U = a.scale_GK[0, order_U]
        co_UK = _products(a.rest_GPK[0], moved_U, count).double()
        bad_U = torch.zeros_like(z_PU[0], dtype=torch.int64) if finite_1PU is None else (~finite_1PU[0]).sum(0)
        state = {
            "n_1": torch.tensor([len(z_PU)], device=z_PU.device),
            "bad_U": bad_U[order_U],
            "mean_U": a.mean_GK[0, order_U],
            "m2_U": squares(a)[0, order_U],
            "co_UK": co_UK.mul_(scale_U[:, None]).mul_(of_behind(scale_U, count)),
        }
        if self.fired:
            # float32 counts the presentations of a slice exactly
            fired_PU = (z_PU > 0).float()
            state["fired_U"] = fired_PU.sum(0).long()[order_U]
            state["both_UK"] = _products(fired_PU, moved_U, count).to(NARROW)
        return state
