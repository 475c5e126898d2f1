"""How often a unit is shown something, fires, and fires anywhere in a row.

Layer 1: pure torch, no I/O. All int64 and exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pipeline.kernels.base import Primitive, State
from pipeline.kernels.view import View
from pipeline.sites import Presentations, Site

_NAMES = ("n", "nonfinite", "zero", "fired", "rows", "rows_fired")


@dataclass(frozen=True)
class Firing(Primitive):
    """Per unit, counts of presentations and rows.

    n           presentations that count
    nonfinite   unmasked presentations that do not, for a NaN or infinity
    zero        presentations with z = 0
    fired       presentations with z > 0
    rows        rows with a presentation that counts
    rows_fired  rows with one that fires
    """

    def empty(self, site: Site) -> State:
        """All 0."""
        return {name: torch.zeros(site.units, dtype=torch.int64) for name in _NAMES}

    def observe(self, presentations: Presentations) -> State:
        """The counts of one batch."""
        view = View.of(presentations)
        zero_LSU = view.z64_LSU == 0
        if view.valid_LSU is not None:
            zero_LSU &= view.valid_LSU
        return {
            "n": view.n_U.clone(),
            "nonfinite": view.nonfinite_U,
            "zero": zero_LSU.sum((0, 1)),
            "fired": view.fired_LSU.sum((0, 1)),
            "rows": view.greatest.found_NU.sum(0),
            "rows_fired": view.row_fired_NU.sum(0),
        }

    def merge(self, left: State, right: State) -> State:
        """The sums."""
        return {name: left[name] + right[name] for name in _NAMES}
