"""What one batch shows, as the kernel for GPUs reads it, how its work is cut, and room for what comes of it.

Layer 1: torch and Triton; only to be imported where that is installed. z, a, y are never copied.

Shapes: L entries, S positions, U units, G groups, R runs of entries, F forms of match.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton

from pipeline.kernels.match import lengths_of
from pipeline.kernels.matchbins import BINS as MATCH_BINS
from pipeline.kernels.places import Places, by_row, places_of
from pipeline.kernels.triton_pass import Found, Parts
from pipeline.kernels.triton_tile import BIN_ROOM, GIVEN, RECTIFIED, SAME, Lengths, Patterns, Shown
from pipeline.sites import Presentations

# numbers that are counted of a unit's presentations, moments of a value, and of matches
COUNTS, MOMENTS, MATCH_MOMENTS, FORMS = 4, 7, 6, 2
# runs times units: more programs than any GPU has room for, and at most 60 MB of bins of their own
RUN_UNITS = 1 << 14
MOST_RUNS = 128
# of the bins of matches: whatever the order in which runs add to them, they come to the same
COPIES = 8
# of a thread, so that several programs are at work at once on a multiprocessor; it would take up to 255
REGISTERS = 128
# tiles that are read before the first is used
AHEAD = 2


class Hand(NamedTuple):
    """What a program has in hand: presentations times units of a tile, units of it at most, and warps that share it."""

    values: int
    units: int
    warps: int


# where units are neighbours in memory, and where positions are: there bins of one unit are, side by side
NEIGHBOURS, STRANGERS = Hand(128, 8, 4), Hand(32, 1, 1)


class Cut:
    """A batch and how it is cut: tiles of (entries, positions, units), runs of `blocks` tiles of entries."""

    def __init__(self, presentations: Presentations) -> None:
        z_LSU = presentations.z_LSU
        self.presentations = presentations
        self.entries, self.positions, self.units = z_LSU.shape
        hand = NEIGHBOURS if z_LSU.stride(2) == 1 else STRANGERS
        units = min(hand.units, triton.next_power_of_2(self.units))
        positions = min(hand.values // units, triton.next_power_of_2(self.positions))
        entries = min(hand.values // (units * positions), triton.next_power_of_2(self.entries))
        self.tile = (entries, positions, units)
        self.at_once = positions >= self.positions
        self.launched = {"num_warps": hand.warps, **({} if torch.version.hip else {"maxnreg": REGISTERS})}
        tiles = triton.cdiv(self.entries, entries)
        runs = min(tiles, MOST_RUNS, max(1, RUN_UNITS // self.units))
        self.blocks = triton.cdiv(tiles, runs)
        self.runs = triton.cdiv(tiles, self.blocks)

    @property
    def copies(self) -> int:
        """Of the bins of matches."""
        return min(self.runs, COPIES)

    @property
    def grid(self) -> tuple[int, int]:
        """Programs: tiles of units, neighbours in memory, and runs."""
        return triton.cdiv(self.units, self.tile[2]), self.runs

    @property
    def a_is(self) -> int:
        """Whether a is z, max(z, 0), or must be read."""
        site, presentations = self.presentations.site, self.presentations
        if presentations.a_LSU is presentations.z_LSU:
            return int(SAME)
        return int(RECTIFIED if site.gate == "relu" and site.up_UD is None else GIVEN)

    def arguments(self, patterns: Patterns, *, matches: bool) -> dict[str, Any]:
        """What the pass reads; where something is not there it is given z, and does not look."""
        shown, z_LSU = self.presentations, self.presentations.z_LSU
        mask_LS = None if shown.mask_LS is None else shown.mask_LS.view(torch.uint8)
        there = (z_LSU, shown.a_LSU, shown.affine_LSU, mask_LS, shown.position_LS)
        memory = Shown(*(z_LSU if one is None else one for one in there))
        lengths = [one.contiguous() for one in lengths_of(shown)] if matches else [z_LSU] * 3
        return {
            "memory": memory,
            "by": Shown(*(one.stride() for one in memory)),
            "lengths": Lengths(*lengths),
            "patterns": patterns,
            "entries": self.entries,
            "positions": self.positions,
            "units": self.units,
            "per_group": self.units // shown.site.groups,
            "groups": shown.site.groups,
            "blocks": self.blocks,
            "copies": self.copies,
            "A_IS": self.a_is,
            "HAS_Y": shown.affine_LSU is not None,
            "HAS_MASK": mask_LS is not None,
            "HAS_NUMBER": shown.position_LS is not None,
            **dict(zip(("BL", "BS", "BU"), self.tile, strict=True)),
            "AHEAD": AHEAD,
            "ONCE": self.at_once,
        }


def parts_of(cut: Cut, wanted: Mapping[str, bool]) -> Parts:
    """Room for what each run comes to; bins begin at 0."""
    device, runs, units = cut.presentations.z_LSU.device, cut.runs, cut.units
    forms = FORMS if wanted["PEARSON"] or wanted["COSINE"] else 0
    bins = BIN_ROOM.value if wanted["BINS"] else 0

    def room(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        return torch.empty(runs, *shape, dtype=dtype, device=device)

    # at once: what is 0 before
    of_matches = cut.copies * forms * units * 2 * MATCH_BINS
    counted = torch.zeros(runs * units * bins + of_matches, dtype=torch.int32, device=device)
    return Parts(
        count=room(COUNTS, units, dtype=torch.int32),
        z=room(MOMENTS, units),
        a=room(MOMENTS, units),
        top=room(units, dtype=torch.int32),
        bins=counted[: runs * units * bins].view(runs, units, bins),
        match_bins=counted[runs * units * bins :].view(cut.copies, forms, units, 2 * MATCH_BINS),
        match=room(forms, MATCH_MOMENTS, units),
    )


def found_in(cut: Cut, wanted: Mapping[str, bool]) -> Found:
    """Room for the extremes of each entry."""
    device = cut.presentations.z_LSU.device

    def room(dtype: torch.dtype, *, is_wanted: bool = True) -> torch.Tensor:
        return torch.empty((cut.entries, cut.units) if is_wanted else 0, dtype=dtype, device=device)

    return Found(
        greatest=room(torch.float32),
        greatest_at=room(torch.int32),
        least=room(torch.float32, is_wanted=wanted["LEAST"]),
        least_at=room(torch.int32, is_wanted=wanted["LEAST"]),
        best=room(torch.float64, is_wanted=wanted["BEST"]),
        best_at=room(torch.int32, is_wanted=wanted["BEST"]),
        output=room(torch.float32, is_wanted=wanted["OUTPUT"]),
    )


def known_of(cut: Cut, found: Found, wanted: Mapping[str, bool]) -> dict[str, Any]:
    """What the extremes say of rows: properties of a `View` of the batch."""
    shown = cut.presentations

    def places(value_LU: torch.Tensor, index_LU: torch.Tensor) -> Places:
        if shown.row_L is None:
            # a row's entry is the row
            return Places(value_LU, shown.uid_N, index_LU)
        return places_of(shown, value_LU.double(), index_LU.long())

    known: dict[str, Any] = {"greatest": places(found.greatest, found.greatest_at)}
    if wanted["LEAST"]:
        known["smallest"] = places(found.least, found.least_at)
    if wanted["BEST"]:
        known["best_match"] = places(found.best, found.best_at)
    if wanted["OUTPUT"]:
        known["row_a_NU"] = by_row(shown, found.output)
    return known
