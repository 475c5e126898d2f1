"""The fused kernel for GPUs: what a site's statistics need of z, a and the match, while they are on the device.

Layer 1: torch and Triton; only to be imported where that is installed, see `triton_build`. Given the same presentations
it equals the reference kernel: counts, extremes and choices exactly, float64 sums to rounding. Classes are summed
from each row's extremes, which the pass finds.

Shapes: U units, R runs of entries, B bins, F forms of match.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import triton

from pipeline.kernels.accumulate import Accumulator
from pipeline.kernels.base import Primitive, State
from pipeline.kernels.bins import BINS, EMPTY_TOP, Bins
from pipeline.kernels.classsums import ClassSums
from pipeline.kernels.counts import LARGEST, NARROW
from pipeline.kernels.firing import Firing
from pipeline.kernels.match import patterns_of
from pipeline.kernels.matchbins import BINS as MATCH_BINS
from pipeline.kernels.matchbins import InputNorm, MatchBins
from pipeline.kernels.moments import Moments, unsigned
from pipeline.kernels.ranked import Ranked
from pipeline.kernels.triton_fold import fold, fold_bins
from pipeline.kernels.triton_labels import ByRow
from pipeline.kernels.triton_pass import Parts, observe
from pipeline.kernels.triton_rows import Rows
from pipeline.kernels.triton_show import Cut, found_in, known_of, parts_of
from pipeline.kernels.triton_sums import norms_of
from pipeline.kernels.triton_tile import SAME, Patterns
from pipeline.kernels.view import View
from pipeline.sites import Presentations, Site

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMS = ("pearson", "cosine")
COUNTED = ("n", "nonfinite", "zero", "fired")
# parts times units that a program folds together
FOLDED = 256
# runs whose bins a program folds together
FOLDED_RUNS = 16
MOMENTS = ("min", "max", "absolute", "mean", "m2", "m3", "m4")


def fused(primitives: Sequence[Primitive]) -> list[Primitive]:
    """Those of the primitives that this kernel computes together."""
    chosen: list[Primitive] = []
    for primitive in primitives:
        match primitive:
            case Moments("z", 4) | Moments("a", 4) | Firing() | Bins() | ClassSums() | Ranked():
                chosen.append(primitive)
            case MatchBins() | InputNorm():
                chosen.append(primitive)
    return chosen


def takes(presentations: Presentations) -> bool:
    """Whether this kernel reads such presentations: on a GPU, in float32 or narrower."""
    z_LSU = presentations.z_LSU
    shown = (z_LSU, presentations.a_LSU, presentations.affine_LSU)
    return (z_LSU.is_cuda or triton.knobs.runtime.interpret) and all(
        one is None or one.dtype in DTYPES for one in shown
    )


class Triton(Accumulator):
    """States grown by the fused kernel; `primitives` are such as `fused` gives."""

    def __init__(self, site: Site, primitives: Sequence[Primitive]) -> None:
        self._site = site
        self._primitives = tuple(primitives)
        kinds = {one.kind for one in primitives if isinstance(one, Ranked)}
        forms = {one.form for one in primitives if isinstance(one, MatchBins)}
        self._wanted = {
            "BINS": Bins() in primitives,
            "PEARSON": "pearson" in forms,
            "COSINE": "cosine" in forms,
            "LEAST": "smallest" in kinds,
            "BEST": "match" in kinds,
            "OUTPUT": any(isinstance(one, ClassSums) for one in primitives),
        }
        self._placed = 0
        self._place(torch.device("cpu"))

    def _place(self, device: torch.device) -> None:
        """Begin with nothing, on a device."""
        self._placed += 1
        units = self._site.units
        self._device = device
        self._patterns = Patterns(*(one.to(device) for one in patterns_of(self._site)))
        self._count_4U = torch.zeros(len(COUNTED), units, dtype=torch.int64, device=device)
        self._z_7U = torch.zeros(len(MOMENTS), units, dtype=torch.float64, device=device)
        self._z_7U[0], self._z_7U[1] = torch.inf, -torch.inf
        self._a_7U = self._z_7U.clone()
        self._top_U = torch.full((units,), EMPTY_TOP, dtype=torch.int64, device=device)
        self._bin_UB = torch.zeros(units, BINS, dtype=NARROW, device=device)
        self._match_bin_FUB = torch.zeros(len(FORMS), units, 2 * MATCH_BINS, dtype=NARROW, device=device)
        self._match_F6U = torch.zeros(len(FORMS), 6, units, dtype=torch.float64, device=device)
        self._norm_2G = torch.zeros(2, self._site.groups, dtype=torch.float64, device=device)
        self._by_row = ByRow([one for one in self._primitives if isinstance(one, ClassSums)], units, device)
        self._kept = {one: Rows(one, units, device) for one in self._primitives if isinstance(one, Ranked)}

    def add(self, presentations: Presentations) -> None:
        """See `Accumulator`."""
        z_LSU = presentations.z_LSU
        if z_LSU.device != self._device:
            self._place(z_LSU.device)
        self._by_row.expect(View.of(presentations))
        if z_LSU.numel():
            with torch.cuda.device_of(z_LSU):
                self._pass(Cut(presentations))

    def _pass(self, cut: Cut) -> None:
        wanted = self._wanted
        matches = wanted["PEARSON"] or wanted["COSINE"] or bool(self._kept) or InputNorm() in self._primitives
        parts, found = parts_of(cut, wanted), found_in(cut, wanted)
        arguments = cut.arguments(self._patterns, matches=matches)
        # contracted, a product and a sum round once: another match, and another bin
        observe[cut.grid](**arguments, **wanted, parts=parts, found=found, enable_fp_fusion=False, **cut.launched)
        self._fold(cut, parts)
        view = View.of(cut.presentations).knowing(**known_of(cut, found, wanted))
        for rows in self._kept.values():
            rows.offer(view, arguments)
        self._by_row.add(view, view.greatest, view.row_a_NU if wanted["OUTPUT"] else view.greatest.value_NU)
        if InputNorm() in self._primitives:
            self._norm_2G += norms_of(cut.presentations).sum(0)

    def _fold(self, cut: Cut, parts: Parts) -> None:
        """Add what the runs came to."""
        units, runs = cut.units, cut.runs
        room = {"units": units, "runs": runs, "BR": triton.next_power_of_2(runs), "enable_fp_fusion": False}
        of_a = parts.z if cut.a_is == SAME else parts.a
        near = max(1, FOLDED // room["BR"])
        fold[(triton.cdiv(units, near),)](
            self._count_4U, self._z_7U, self._a_7U, self._match_F6U,
            parts.count, parts.z, of_a, parts.match,
            PEARSON=self._wanted["PEARSON"], COSINE=self._wanted["COSINE"], BU=near, **room,
        )  # fmt: skip
        if self._wanted["BINS"]:
            several = min(FOLDED_RUNS, room["BR"])
            fold_bins[(units,)](self._top_U, self._bin_UB, parts.top, parts.bins, BN=several, **room)
        if self._wanted["PEARSON"] or self._wanted["COSINE"]:
            self._match_bin_FUB += parts.match_bins.sum(0, dtype=NARROW)

    @property
    def room(self) -> int:
        """See `Accumulator`: every state is changed where it is."""
        return LARGEST

    @property
    def begun(self) -> tuple[int, ...]:
        """See `Accumulator`."""
        return self._placed, self._by_row.widened

    def states(self) -> Mapping[Primitive, State]:
        """See `Accumulator`."""
        return {primitive: self._state(primitive) for primitive in self._primitives}

    def _state(self, primitive: Primitive) -> State:
        counts = dict(zip(COUNTED, self._count_4U.unbind(0), strict=True))
        match primitive:
            case Firing():
                rows_U, fired_U = self._by_row.rows_2U
                return _copied({**counts, "rows": rows_U, "rows_fired": fired_U})
            case Moments(quantity):
                moments_7U = self._z_7U if quantity == "z" else self._a_7U
                found = {"n": counts["n"], **dict(zip(MOMENTS, moments_7U.unbind(0), strict=True))}
                return unsigned(_copied({name: found[name] for name in primitive.empty(self._site)}))
            case Bins():
                return _copied({"top": self._top_U, "count": self._bin_UB})
            case MatchBins(form):
                return self._match_state(FORMS.index(form), counts["n"])
            case Ranked():
                return self._kept[primitive].state()
            case InputNorm():
                n_G, total_G = self._norm_2G
                return {"n": n_G.long(), "mean": total_G / n_G.clamp(min=1)}
            case ClassSums():
                return self._by_row.of_classes(primitive)
        raise AssertionError(primitive)

    def _match_state(self, form: int, n_U: torch.Tensor) -> State:
        """Silent, then firing."""
        count_2UB = self._match_bin_FUB[form].unflatten(1, (2, MATCH_BINS)).movedim(1, 0)
        state = {"undefined": n_U - count_2UB.sum((0, 2))}
        for which, name in enumerate(("silent", "fired")):
            _, mean_U, m2_U = self._match_F6U[form].unflatten(0, (2, 3))[which]
            state |= {f"{name}_count": count_2UB[which], f"{name}_mean": mean_U, f"{name}_m2": m2_U}
        return _copied(state)


def _copied(state: Mapping[str, torch.Tensor]) -> State:
    return {name: value.clone(memory_format=torch.contiguous_format) for name, value in state.items()}
