"""Count, extremes and central moments of z or a, right at any mean.

Layer 1: pure torch, no I/O. Each batch is centred on its own mean in float64 and merged by the pairwise updates of
Chan, Golub & LeVeque (1979) for M2 and Pébay (2008, eqs. 2.1 and 2.2 of SAND2008-6212) for M3 and M4; raw power sums
would lose every digit at a large mean.

Shapes: L entries, S positions, U units.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from pipeline.kernels.base import Primitive, State
from pipeline.kernels.view import View
from pipeline.sites import Presentations, Site

Quantity = Literal["z", "a"]


@dataclass(frozen=True)
class Moments(Primitive):
    """Per unit: n, min, max, absolute = Σ|v|, mean, and m2 … m<order> = Σ(v − mean)^p of z or a."""

    quantity: Quantity
    order: Literal[2, 4]

    def __post_init__(self) -> None:
        if self.order not in (2, 4):
            raise ValueError(f"Moments({self.quantity!r}, {self.order}): expected order 2 or 4")

    def empty(self, site: Site) -> State:
        """No presentations: extremes at ±inf, everything else 0."""
        sums = {name: torch.zeros(site.units, dtype=torch.float64) for name in ("absolute", *self._central)}
        extremes = {
            "min": torch.full((site.units,), torch.inf, dtype=torch.float64),
            "max": torch.full((site.units,), -torch.inf, dtype=torch.float64),
        }
        return {"n": torch.zeros(site.units, dtype=torch.int64), **extremes, **sums}

    @property
    def _central(self) -> tuple[str, ...]:
        return ("mean", *(f"m{power}" for power in range(2, self.order + 1)))

    def observe(self, presentations: Presentations) -> State:
        """One batch, centred on its own mean."""
        view = View.of(presentations)
        value_LSU = view.z64_LSU if self.quantity == "z" else view.a64_LSU
        extremes = _extremes(view, value_LSU)
        # the mean of equal numbers is that number, whatever the sum rounds to
        mean_U = (value_LSU.sum((0, 1)) / view.n_U.clamp(min=1)).clamp(extremes["min"], extremes["max"])
        mean_U = mean_U.masked_fill(view.n_U == 0, 0)
        rest_LSU = view.counted(value_LSU - mean_U)
        square_LSU = rest_LSU.square()
        state = {"n": view.n_U.clone(), **extremes, "absolute": value_LSU.abs().sum((0, 1)), "mean": mean_U}
        state = unsigned(state)
        state["m2"] = square_LSU.sum((0, 1))
        if self.order == 4:
            state["m3"] = (square_LSU * rest_LSU).sum((0, 1))
            state["m4"] = square_LSU.square().sum((0, 1))
        return state

    def merge(self, left: State, right: State) -> State:
        """Both: extremes exactly, moments by the pairwise updates."""
        return {
            "n": left["n"] + right["n"],
            "min": torch.minimum(left["min"], right["min"]),
            "max": torch.maximum(left["max"], right["max"]),
            "absolute": left["absolute"] + right["absolute"],
            **merge_central(left, right),
        }


def unsigned(state: State) -> State:
    """The state with 0 in place of −0: which of the two is met first must not show, for they are equal."""
    return state | {name: state[name] + 0.0 for name in ("min", "max", "mean")}


def merge_central(left: State, right: State) -> State:
    """The mean, and m2 … m4 as far as both have them, of two sets of `n` values, of any shape; either may be empty."""
    total = (left["n"] + right["n"]).clamp(min=1).double()
    f, g = left["n"] / total, right["n"] / total
    both = (left["n"] > 0) & (right["n"] > 0)
    d = (right["mean"] - left["mean"]).masked_fill(~both, 0)
    merged = {"mean": torch.where(left["n"] == 0, right["mean"], left["mean"] + d * g)}
    if "m2" in left:
        merged["m2"] = left["m2"] + right["m2"] + d.square() * (total * f * g)
    if "m4" in left:
        merged["m3"] = (
            (left["m3"] + right["m3"])
            + d.pow(3) * (total * f * g * (f - g))
            + 3 * d * (f * right["m2"] - g * left["m2"])
        )
        merged["m4"] = (
            (left["m4"] + right["m4"])
            + d.pow(4) * (total * f * g * (f * f - f * g + g * g))
            + 6 * d.square() * (f * f * right["m2"] + g * g * left["m2"])
            + 4 * d * (f * right["m3"] - g * left["m3"])
        )
    return merged


def _extremes(view: View, value_LSU: torch.Tensor) -> State:
    if not view.entries or not view.positions:
        nothing_U = value_LSU.new_full((view.site.units,), torch.inf)
        return {"min": nothing_U, "max": -nothing_U}
    return {
        "min": view.counted(value_LSU, torch.inf).amin((0, 1)),
        "max": view.counted(value_LSU, -torch.inf).amax((0, 1)),
    }
