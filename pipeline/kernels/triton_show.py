"""What one batch shows, as the kernel for GPUs reads it, how its work is cut, and room for what comes of it.

Layer 1: torch and Triton; only to be imported where that is installed. z, a, y are never copied.

Shapes: L entries, S positions, U units, G groups, R runs of entries, F forms of match.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton

from pipeline.kernels.match import lengths_of
from pipeline.kernels.matchbins import BINS as MATCH_BINS
from pipeline.kernels.places import by_row, places_of
from pipeline.kernels.triton_pass import BIN_ROOM, GIVEN, RECTIFIED, SAME
from pipeline.sites import Presentations

# numbers that are counted of a unit's presentations, moments of a value, and of matches
COUNTS, MOMENTS, MATCH_MOMENTS, FORMS = 4, 7, 6, 2
# runs times units: more programs than any GPU has room for, and at most 60 MB of bins of their own
RUN_UNITS = 1 << 14
MOST_RUNS = 128
# presentations times units that a program has in hand; units read together where they are neighbours in memory, and
# where positions are
TILE = 1024
NEIGHBOURS, STRANGERS = 32, 4


class Shown:
    """A batch and how it is cut: tiles of (entries, positions, units), runs of `blocks` tiles of entries."""

    def __init__(self, presentations: Presentations) -> None:
        z_LSU = presentations.z_LSU
        self.presentations = presentations
        self.entries, self.positions, self.units = z_LSU.shape
        near = NEIGHBOURS if z_LSU.stride(2) == 1 else STRANGERS
        units = min(near, triton.next_power_of_2(self.units))
        positions = min(TILE // units, triton.next_power_of_2(self.positions))
        entries = min(TILE // (units * positions), triton.next_power_of_2(self.entries))
        self.tile = (entries, positions, units)
        tiles = triton.cdiv(self.entries, entries)
        runs = min(tiles, MOST_RUNS, max(1, RUN_UNITS // self.units))
        self.blocks = triton.cdiv(tiles, runs)
        self.runs = triton.cdiv(tiles, self.blocks)

    @property
    def a_is(self) -> int:
        """Whether a is z, max(z, 0), or must be read."""
        site, presentations = self.presentations.site, self.presentations
        if presentations.a_LSU is presentations.z_LSU:
            return int(SAME)
        return int(RECTIFIED if site.gate == "relu" and site.up_UD is None else GIVEN)

    def arguments(self, patterns: Sequence[torch.Tensor], *, matches: bool) -> dict[str, Any]:
        """What the pass reads; where something is not there it is given z, and does not look."""
        shown = self.presentations
        z_LSU, number_LS = shown.z_LSU, shown.position_LS
        y_LSU = z_LSU if shown.affine_LSU is None else shown.affine_LSU
        mask_LS = None if shown.mask_LS is None else shown.mask_LS.view(torch.uint8)
        sums = [one.contiguous() for one in lengths_of(shown)] if matches else [z_LSU] * 3
        named = {"z": z_LSU, "a": shown.a_LSU, "y": y_LSU, "mask": mask_LS, "number": number_LS}
        tensors = {name: z_LSU if one is None else one for name, one in named.items()}
        strides = {f"{name}_by": one.stride() for name, one in tensors.items()}
        per_x = dict(zip(("sum_LSG", "pearson_LSG", "cosine_LSG"), sums, strict=True))
        per_unit = dict(zip(("bias_U", "mean_U", "pearson_U", "cosine_U"), patterns, strict=True))
        sizes = {"entries": self.entries, "positions": self.positions, "units": self.units, "blocks": self.blocks}
        groups = {"groups": shown.site.groups, "per_group": self.units // shown.site.groups}
        flags = {
            "A_IS": self.a_is,
            "HAS_Y": shown.affine_LSU is not None,
            "HAS_MASK": mask_LS is not None,
            "HAS_NUMBER": number_LS is not None,
        }
        tile = dict(zip(("BL", "BS", "BU"), self.tile, strict=True))
        return tensors | strides | per_x | per_unit | sizes | groups | flags | tile


def parts_of(shown: Shown, wanted: Mapping[str, bool]) -> dict[str, torch.Tensor]:
    """Room for what each run comes to; bins begin at 0."""
    device, runs, units = shown.presentations.z_LSU.device, shown.runs, shown.units
    forms = FORMS if wanted["PEARSON"] or wanted["COSINE"] else 0
    bins = BIN_ROOM.value if wanted["BINS"] else 0

    def room(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        return torch.empty(runs, *shape, dtype=dtype, device=device)

    return {
        "count_R4U": room(COUNTS, units, dtype=torch.int32),
        "z_R7U": room(MOMENTS, units),
        "a_R7U": room(MOMENTS, units),
        "top_RU": room(units, dtype=torch.int32),
        "bin_RUB": room(units, bins, dtype=torch.int32).zero_(),
        "match_bin_RFUB": room(forms, units, 2 * MATCH_BINS, dtype=torch.int32).zero_(),
        "match_RF6U": room(forms, MATCH_MOMENTS, units),
    }


class Extremes:
    """Of every entry the greatest of some values and where they stand: room for them, and what they say of rows."""

    def __init__(self, shown: Shown, wanted: Mapping[str, bool]) -> None:
        self._presentations = shown.presentations
        self._wanted = wanted
        device, shape = shown.presentations.z_LSU.device, (shown.entries, shown.units)

        def room(name: str, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(shape if wanted.get(name, True) else 0, dtype=dtype, device=device)

        self.arguments = {
            "greatest_LU": room("GREATEST", torch.float32),
            "greatest_at_LU": room("GREATEST", torch.int32),
            "least_LU": room("LEAST", torch.float32),
            "least_at_LU": room("LEAST", torch.int32),
            "best_LU": room("BEST", torch.float64),
            "best_at_LU": room("BEST", torch.int32),
            "output_LU": room("OUTPUT", torch.float32),
        }

    def known(self) -> dict[str, Any]:
        """Properties of a `View` of the batch."""
        presentations, found = self._presentations, self.arguments
        names = {"greatest": "GREATEST", "least": "LEAST", "best": "BEST"}
        places = {
            name: places_of(presentations, found[f"{name}_LU"].double(), found[f"{name}_at_LU"].long())
            for name, flag in names.items()
            if self._wanted.get(flag, True)
        }
        called = {"greatest": "greatest", "least": "smallest", "best": "best_match"}
        known: dict[str, Any] = {called[name]: place for name, place in places.items()}
        if self._wanted["OUTPUT"]:
            known["row_a_NU"] = by_row(presentations, found["output_LU"].double())
        return known
