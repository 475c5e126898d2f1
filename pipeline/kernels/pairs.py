"""Co-moments and joint firing of pairs of units of one site.

Layer 1: pure torch, no I/O. Every unit is paired with K reference units, so that the state of a unit is bounded: with
all of them where the site has no more than that, else with K spread evenly over the site.

Shapes: U units, K reference units, P presentations.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pipeline.kernels.base import Primitive, State
from pipeline.kernels.comoment import all_finite, as_float, centred, observe_slices, products, squares
from pipeline.sites import Presentations, Site


def references(site: Site, largest: int) -> torch.Tensor:
    """The units that every unit is paired with, int64 in rising order: all, or `largest` of them evenly spread."""
    count = min(site.units, largest)
    return torch.arange(count) * site.units // count


@dataclass(frozen=True)
class UnitPairs(Primitive):
    """Σ(a_u − ā_u)(a_k − ā_k), and in how many presentations both fire, over the unmasked presentations of a site.

    Left out are presentations that no unit makes anything finite of: a row with a NaN. A unit with a value that is not
    finite at another one, of z or of a, is counted in `bad_U`: its other numbers mean nothing.

    n_1       int64, presentations
    bad_U     int64, those at which z or a of the unit is not finite
    mean_U, m2_U   mean of a and Σ(a − ā)²
    co_UK     co-moments with the reference units
    fired_U, both_UK   int64, presentations with z > 0, and with z > 0 of both; only where `fired`
    """

    largest: int
    fired: bool = True

    def empty(self, site: Site) -> State:
        """Nothing seen."""
        units, count = site.units, len(references(site, self.largest))
        state = {
            "n_1": torch.zeros(1, dtype=torch.int64),
            "bad_U": torch.zeros(units, dtype=torch.int64),
            "mean_U": torch.zeros(units, dtype=torch.float64),
            "m2_U": torch.zeros(units, dtype=torch.float64),
            "co_UK": torch.zeros((units, count), dtype=torch.float64),
        }
        if self.fired:
            state["fired_U"] = torch.zeros(units, dtype=torch.int64)
            state["both_UK"] = torch.zeros((units, count), dtype=torch.int64)
        return state

    def observe(self, presentations: Presentations) -> State:
        """Merge the pairs of the batch's slices."""
        return observe_slices(self, presentations, self._slice, width=presentations.site.units)

    def merge(self, left: State, right: State) -> State:
        """Chan's update of means and co-moments; counts add."""
        n_1 = left["n_1"] + right["n_1"]
        share_1 = right["n_1"].double() / n_1.clamp(min=1)
        step_U = right["mean_U"] - left["mean_U"]
        units, count = left["co_UK"].shape
        reference_K = torch.arange(count, device=step_U.device) * units // max(1, count)
        weighted_U = left["n_1"] * share_1 * step_U
        merged = {name: left[name] + right[name] for name in left}
        return merged | {
            "mean_U": left["mean_U"] + step_U * share_1,
            "m2_U": merged["m2_U"] + weighted_U * step_U,
            "co_UK": torch.addr(merged["co_UK"], weighted_U, step_U[reference_K]),
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
        a = centred(as_float(a_PU)[None], finite_1PU)
        reference_K = references(presentations.site, self.largest).to(z_PU.device)
        chosen = a._replace(rest_GPK=a.rest_GPK[..., reference_K], scale_GK=a.scale_GK[:, reference_K])
        bad_U = torch.zeros_like(z_PU[0], dtype=torch.int64) if finite_1PU is None else (~finite_1PU[0]).sum(0)
        state = {
            "n_1": torch.tensor([len(z_PU)], device=z_PU.device),
            "bad_U": bad_U,
            "mean_U": a.mean_GK[0],
            "m2_U": squares(a)[0],
            "co_UK": products(a, chosen)[0],
        }
        if self.fired:
            # float32 counts the presentations of a slice exactly
            fired_PU = (z_PU > 0).float()
            state["fired_U"] = fired_PU.sum(0).long()
            state["both_UK"] = (fired_PU.T @ fired_PU[:, reference_K]).long()
        return state
