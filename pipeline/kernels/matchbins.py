"""How well inputs match patterns, when the unit fires and when it is silent: moments, and a histogram with both counts.

Layer 1: pure torch, no I/O. Bins are log-linear and signed, read from the float64's bits: 8 per octave over [2⁻¹², 1]
and one for what is smaller on either side of zero. Equal bins would not do: with thousands of inputs a match is of the
order of 1/√D, and 64 equal bins blur the firing and the silent into one.

Order of the `BINS` counts of a unit: rising match; 0 itself lies in the small positive bin.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pipeline.kernels.base import Primitive, State
from pipeline.kernels.bins import count_by_unit, lattice, lattice_edge
from pipeline.kernels.counts import NARROW, added, narrowed
from pipeline.kernels.match import Form, Match
from pipeline.kernels.moments import merge_central
from pipeline.kernels.view import View
from pipeline.sites import Presentations, Site

MANTISSA_BITS = 3
LEAST_EXPONENT = -12
# magnitude bins of one sign: the small one, and 8 in each of 12 octaves; 1 itself is in the last
SIDE = 1 + ((-LEAST_EXPONENT) << MANTISSA_BITS)
BINS = 2 * SIDE
BELOW = (LEAST_EXPONENT << MANTISSA_BITS) - 1
_STATES = ("fired", "silent")


@dataclass(frozen=True)
class MatchBins(Primitive):
    """Per unit: undefined, and for firing ("fired") and silent presentations apart the bins' `counts`, mean and m2."""

    form: Form

    def empty(self, site: Site) -> State:
        """All 0."""
        state = {"undefined": torch.zeros(site.units, dtype=torch.int64)}
        for name in _STATES:
            state[f"{name}_count"] = torch.zeros(site.units, BINS, dtype=NARROW)
            state[f"{name}_mean"] = torch.zeros(site.units, dtype=torch.float64)
            state[f"{name}_m2"] = torch.zeros(site.units, dtype=torch.float64)
        return state

    def observe(self, presentations: Presentations) -> State:
        """Bin the match of every presentation that counts."""
        view = View.of(presentations)
        found = view.pearson if self.form == "pearson" else view.cosine
        # one bincount for both: the firing in the upper half of each unit's bins
        bin_LSU = _bin(found).add_(view.fired_LSU, alpha=BINS)
        count_U2B = count_by_unit(bin_LSU, found.defined, 2 * BINS).unflatten(1, (2, BINS))
        count = {"fired": count_U2B[:, 1], "silent": count_U2B[:, 0]}
        state = {"undefined": view.n_U - count_U2B.sum((1, 2))}
        # products with 0 and 1: masked_fill is slow on a convolution's memory order
        fired_LSU = view.fired_LSU.double()
        for name, chosen_LSU in (("fired", fired_LSU), ("silent", 1 - fired_LSU)):
            if found.defined is not None:
                chosen_LSU = chosen_LSU * found.defined
            mean_U = (found.value * chosen_LSU).sum((0, 1)) / count[name].sum(1).clamp(min=1)
            rest_LSU = (found.value - mean_U).mul_(chosen_LSU)
            state[f"{name}_count"] = narrowed(count[name])
            state[f"{name}_mean"] = mean_U
            state[f"{name}_m2"] = rest_LSU.square_().sum((0, 1))
        return state

    def merge(self, left: State, right: State) -> State:
        """The sums, and moments by the pairwise update."""
        merged = {"undefined": left["undefined"] + right["undefined"]}
        for name in _STATES:
            central = merge_central(moments_of(left, name), moments_of(right, name))
            merged[f"{name}_count"] = added(left[f"{name}_count"], right[f"{name}_count"])
            merged |= {f"{name}_{key}": value for key, value in central.items()}
        return merged


def moments_of(state: State, name: str) -> State:
    """n, mean and m2 of the match when the unit is "fired" or "silent"."""
    n_U = state[f"{name}_count"].sum(1)
    return {"n": n_U, "mean": state[f"{name}_mean"], "m2": state[f"{name}_m2"]}


def _bin(found: Match) -> torch.Tensor:
    place_LSU = lattice(found.value, MANTISSA_BITS).sub_(BELOW).clamp_(0, SIDE - 1)
    # the bits of −1 turn a place p on the negative side into −1 − p
    return place_LSU.bitwise_xor_(found.value.view(torch.int64) >> 63).add_(SIDE)


def edges(device: torch.device | None = None) -> torch.Tensor:
    """The edges of the bins, rising from −1 to 1, float64 (BINS + 1,)."""
    side = lattice_edge(torch.arange(BELOW + 1, BELOW + 1 + SIDE, device=device), MANTISSA_BITS)
    return torch.cat([-side.flip(0), side.new_zeros(1), side])


@dataclass(frozen=True)
class InputNorm(Primitive):
    """Per group of units: presentations with a finite ‖x‖ (n), and the mean of ‖x‖ over them."""

    def empty(self, site: Site) -> State:
        """All 0."""
        return {
            "n": torch.zeros(site.groups, dtype=torch.int64),
            "mean": torch.zeros(site.groups, dtype=torch.float64),
        }

    def observe(self, presentations: Presentations) -> State:
        """The mean of one batch."""
        norm_LSG = presentations.input_sums().square_LSG.sqrt()
        counted_LSG = norm_LSG.isfinite()
        if presentations.mask_LS is not None:
            counted_LSG = counted_LSG & presentations.mask_LS[:, :, None]
        n_G = counted_LSG.sum((0, 1))
        return {"n": n_G, "mean": norm_LSG.masked_fill(~counted_LSG, 0).sum((0, 1)) / n_G.clamp(min=1)}

    def merge(self, left: State, right: State) -> State:
        """The mean of both."""
        return {"n": left["n"] + right["n"], **merge_central(left, right)}
