"""The histogram of z: signed log-linear bins that follow the largest |z| of the unit.

Layer 1: pure torch, no I/O. A magnitude's *lattice number* is its float's exponent and first two mantissa bits, so
reading it is exact: number k covers [2^e (1 + m/4), 2^e (1 + (m+1)/4)) with k = 4e + m. A state keeps the `KEPT`
lattice numbers up to the largest seen, 14 octaves, on either side of zero; what is smaller is counted together. Bins
only ever join this way, so the state depends on the numbers seen and on nothing else. No magnitude is out of range: a
fixed range of as many bins would miss the z of 10⁴ that unscaled inputs give, or resolve small ones worse.

A quantile read from it is off by less than its bin: 25 % of itself at most, or 2⁻¹³ of the largest |z| near zero.

Order of the `BINS` counts of a unit: negative by falling magnitude, negative and small, zero, positive and small,
positive by rising magnitude.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pipeline.kernels.base import Primitive, State
from pipeline.kernels.counts import NARROW, added, narrowed
from pipeline.kernels.view import View
from pipeline.sites import Presentations, Site

MANTISSA_BITS = 2
PER_OCTAVE = 1 << MANTISSA_BITS
OCTAVES = 14
KEPT = PER_OCTAVE * OCTAVES
BINS = 2 * (KEPT + 1) + 1
ZERO = KEPT + 1
# float32's smallest normal number; what is below is small for every dtype
LEAST = -126 * PER_OCTAVE
# the largest number of a state that has seen nothing
EMPTY_TOP = LEAST + KEPT - 1


def lattice(value: torch.Tensor, mantissa_bits: int) -> torch.Tensor:
    """The lattice number of |value|, int32 or int64, read from the bits: exponent · 2^bits + first mantissa bits.

    >>> lattice(torch.tensor([1.0, -1.25, 1.999, 2.0, 0.75]), 2).tolist()
    [0, 1, 3, 4, -2]
    """
    if value.dtype == torch.float64:
        number = value.view(torch.int64) & ((1 << 63) - 1)
        return number.bitwise_right_shift_(52 - mantissa_bits).sub_(1023 << mantissa_bits)
    number = value.float().view(torch.int32) & ((1 << 31) - 1)
    return number.bitwise_right_shift_(23 - mantissa_bits).sub_(127 << mantissa_bits)


def lattice_edge(number: torch.Tensor, mantissa_bits: int) -> torch.Tensor:
    """The smallest magnitude with this lattice number, float64.

    >>> lattice_edge(torch.tensor([-2, 0, 1, 4]), 2).tolist()
    [0.75, 1.0, 1.25, 2.0]
    """
    mantissa = 1 + (number & ((1 << mantissa_bits) - 1)).double() / (1 << mantissa_bits)
    return torch.ldexp(mantissa, number >> mantissa_bits)


@dataclass(frozen=True)
class Bins(Primitive):
    """Per unit: `top`, the largest lattice number in the window, and the `counts` of the `BINS` bins below it."""

    def empty(self, site: Site) -> State:
        """All 0, the window at the bottom."""
        return {
            "top": torch.full((site.units,), EMPTY_TOP, dtype=torch.int64),
            "count": torch.zeros(site.units, BINS, dtype=NARROW),
        }

    def observe(self, presentations: Presentations) -> State:
        """Count one batch in the window that its own largest |z| needs."""
        view = View.of(presentations)
        number_LSU = lattice(view.z_LSU, MANTISSA_BITS)
        if view.valid_LSU is not None:
            number_LSU.masked_fill_(~view.valid_LSU, LEAST)
        top_U = torch.full((view.site.units,), EMPTY_TOP, dtype=number_LSU.dtype, device=number_LSU.device)
        if number_LSU.numel():
            top_U = torch.maximum(top_U, number_LSU.amax((0, 1)))
        # 0 is zero, 1 small, 2 … KEPT + 1 the window; then negative on the negative side
        place_LSU = number_LSU.sub_(top_U - KEPT - 1).clamp_(min=1).mul_(view.z_LSU != 0)
        place_LSU.mul_((view.z_LSU < 0).to(place_LSU.dtype).mul_(-2).add_(1)).add_(ZERO)
        return {"top": top_U.long(), "count": narrowed(count_by_unit(place_LSU, view.valid_LSU, BINS))}

    def merge(self, left: State, right: State) -> State:
        """Count both in the higher of the two windows."""
        top_U = torch.maximum(left["top"], right["top"])
        return {"top": top_U, "count": added(_raised(left, top_U), _raised(right, top_U))}


def count_by_unit(bin_LSU: torch.Tensor, counted_LSU: torch.Tensor | None, bins: int) -> torch.Tensor:
    """How many presentations of each unit lie in each bin, int64 (U, bins); those not counted are left out."""
    units = bin_LSU.shape[2]
    flat_LSU = bin_LSU + torch.arange(units, device=bin_LSU.device, dtype=bin_LSU.dtype) * bins
    if counted_LSU is not None:
        flat_LSU = flat_LSU.masked_fill(~counted_LSU, units * bins)
    # in the order of the memory: a convolution's channels come first, and need no transposed copy
    in_memory = sorted(range(3), key=flat_LSU.stride, reverse=True)
    count = torch.bincount(flat_LSU.permute(in_memory).flatten(), minlength=units * bins + 1)
    return count[: units * bins].view(units, bins)


def _raised(state: State, top_U: torch.Tensor) -> torch.Tensor:
    """The counts in a higher window: what falls out below joins the small ones."""
    count_UB = state["count"]
    if bool((state["top"] == top_U).all()):
        return count_UB
    rise_U1 = (top_U - state["top"])[:, None]
    negative_UK = _side_raised(count_UB[:, :ZERO].flip(1), rise_U1).flip(1)
    positive_UK = _side_raised(count_UB[:, ZERO + 1 :], rise_U1)
    return torch.cat([negative_UK, count_UB[:, ZERO : ZERO + 1], positive_UK], 1)


def _side_raised(count_UK: torch.Tensor, rise_U1: torch.Tensor) -> torch.Tensor:
    """Counts by rising magnitude, the small ones first, `rise` places lower."""
    place_UK = torch.arange(KEPT + 1, device=count_UK.device) + rise_U1
    raised_UK = count_UK.gather(1, place_UK.clamp(max=KEPT)).masked_fill(place_UK > KEPT, 0)
    fallen_U1 = count_UK.cumsum(1).gather(1, rise_U1.clamp(max=KEPT))
    return torch.cat([fallen_U1, raised_UK[:, 1:]], 1)


def bin_edges(top_U: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Lower and upper edges of every bin, float64 (U, BINS), ascending; the zero bin is [0, 0]."""
    number_UK = top_U[:, None] + torch.arange(1 - KEPT, 2, device=top_U.device)
    edge_UK = lattice_edge(number_UK, MANTISSA_BITS)
    zero_U1 = torch.zeros_like(edge_UK[:, :1])
    magnitude_UK = torch.cat([zero_U1, edge_UK], 1)
    low_UB = torch.cat([-magnitude_UK[:, 1:].flip(1), zero_U1, magnitude_UK[:, :-1]], 1)
    high_UB = torch.cat([-magnitude_UK[:, :-1].flip(1), zero_U1, magnitude_UK[:, 1:]], 1)
    return low_UB, high_UB


def bin_numbers(top_U: torch.Tensor) -> torch.Tensor:
    """A number for every bin, int64 (U, BINS), the same for the same edges in every unit (small bins: that below)."""
    magnitude_UK = top_U[:, None] + torch.arange(-KEPT, 1, device=top_U.device) - LEAST + 2
    return torch.cat([-magnitude_UK.flip(1), torch.zeros_like(magnitude_UK[:, :1]), magnitude_UK], 1)


def quantiles(count_UB: torch.Tensor, low_UB: torch.Tensor, high_UB: torch.Tensor, at: float) -> torch.Tensor:
    """The value of rank ⌈at·n⌉ of n counted values, placed evenly in its bin, float64 (U,); NaN for n = 0."""
    below_UB = count_UB.cumsum(1)
    n_U = below_UB[:, -1]
    rank_U = (at * n_U.double()).ceil().clamp(min=1)
    bin_U1 = (below_UB < rank_U[:, None]).sum(1, keepdim=True).clamp(max=count_UB.shape[1] - 1)
    inside_U1 = count_UB.gather(1, bin_U1)
    part_U1 = (rank_U[:, None] - (below_UB.gather(1, bin_U1) - inside_U1) - 0.5) / inside_U1
    low_U1, high_U1 = low_UB.gather(1, bin_U1), high_UB.gather(1, bin_U1)
    return (low_U1 + (high_U1 - low_U1) * part_U1)[:, 0].masked_fill(n_U == 0, torch.nan)
