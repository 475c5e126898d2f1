"""The numbers that the native kernel grows: as they begin, and as the states of the primitives that they stand for.

Layer 1: torch. A state is a copy: what is added later does not change it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from pipeline.kernels.base import Primitive, State
from pipeline.kernels.bins import BINS, EMPTY_TOP, Bins
from pipeline.kernels.classsums import ClassSums
from pipeline.kernels.firing import Firing
from pipeline.kernels.matchbins import BINS as MATCH_BINS
from pipeline.kernels.matchbins import MatchBins
from pipeline.kernels.moments import Moments
from pipeline.kernels.native_show import point
from pipeline.kernels.native_task import COUNTED, COUNTS, FORMS, KINDS, MATCH_MOMENTS, MOMENTS, Task
from pipeline.kernels.ranked import STRATA, Ranked
from pipeline.sites import Site


@dataclass(frozen=True, eq=False)
class Sums:
    """Counts, moments and bins of every unit; F forms of match, each of the silent and of the firing."""

    count_U6: torch.Tensor
    z_U7: torch.Tensor
    a_U7: torch.Tensor
    top_U: torch.Tensor
    bin_UB: torch.Tensor
    undefined_FU: torch.Tensor
    match_FU2B: torch.Tensor
    match_FU23: torch.Tensor

    @classmethod
    def empty(cls, units: int, *, forms: bool) -> Sums:
        """Nothing seen; room for matches only where they are wanted."""
        both = len(FORMS) if forms else 0
        moments_U7 = torch.zeros(units, len(MOMENTS), dtype=torch.float64)
        moments_U7[:, :2] = torch.tensor([torch.inf, -torch.inf])
        return cls(
            count_U6=torch.zeros(units, len(COUNTED), dtype=torch.int64),
            z_U7=moments_U7,
            a_U7=moments_U7.clone(),
            top_U=torch.full((units,), EMPTY_TOP, dtype=torch.int64),
            bin_UB=torch.zeros(units, BINS, dtype=torch.int64),
            undefined_FU=torch.zeros(both, units, dtype=torch.int64),
            match_FU2B=torch.zeros(both, units, 2, MATCH_BINS, dtype=torch.int64),
            match_FU23=torch.zeros(both, units, 2, len(MATCH_MOMENTS), dtype=torch.float64),
        )

    def bind(self, task: Task) -> None:
        """Let a task grow these."""
        point(
            task, count_U6=self.count_U6, z_U=self.z_U7, a_U=self.a_U7, top_U=self.top_U, bin_UB=self.bin_UB,
            undefined_FU=self.undefined_FU, match_FUB=self.match_FU2B, match_FU2=self.match_FU23,
        )  # fmt: skip

    def state(self, primitive: Primitive, site: Site) -> State:
        """The state of a primitive that has neither rows nor classes."""
        match primitive:
            case Firing():
                return _copied(dict(zip(COUNTED, self.count_U6.unbind(1), strict=True)))
            case Moments(quantity):
                moments_U7 = self.z_U7 if quantity == "z" else self.a_U7
                found = {"n": self.count_U6[:, 0], **dict(zip(MOMENTS, moments_U7.unbind(1), strict=True))}
                return _copied({name: found[name] for name in primitive.empty(site)})
            case Bins():
                return _copied({"top": self.top_U, "count": self.bin_UB})
            case MatchBins(form):
                return self._match_state(FORMS.index(form))
        raise TypeError(f"{primitive} is not among what is summed")

    def _match_state(self, form: int) -> State:
        state = {"undefined": self.undefined_FU[form]}
        for which, name in enumerate(("silent", "fired")):
            _, mean_U, m2_U = self.match_FU23[form, :, which].unbind(1)
            state |= {f"{name}_count": self.match_FU2B[form, :, which], f"{name}_mean": mean_U, f"{name}_m2": m2_U}
        return _copied(state)


@dataclass(frozen=True, eq=False)
class ByClass:
    """Rows, firing rows, mean and Σ(a − ā)² of the greatest a of a row, by class; J ways to label rows."""

    n_JUC: torch.Tensor
    fired_JUC: torch.Tensor
    mean_JUC: torch.Tensor
    m2_JUC: torch.Tensor

    @classmethod
    def empty(cls, units: int, *, ways: int, classes: int) -> ByClass:
        """No rows."""
        counts = (torch.zeros(ways, units, classes, dtype=torch.int64) for _ in range(2))
        return cls(*counts, *(torch.zeros(ways, units, classes, dtype=torch.float64) for _ in range(2)))

    @property
    def classes(self) -> int:
        """How many classes there is room for."""
        return self.n_JUC.shape[2]

    def widened(self, classes: int) -> ByClass:
        """The same with room for more classes."""
        more = (0, classes - self.classes)
        arrays = (self.n_JUC, self.fired_JUC, self.mean_JUC, self.m2_JUC)
        return ByClass(*(torch.nn.functional.pad(value, more) for value in arrays))

    def bind(self, task: Task) -> None:
        """Let a task grow these."""
        task.classes = self.classes
        point(
            task, class_n_JUC=self.n_JUC, class_fired_JUC=self.fired_JUC, class_mean_JUC=self.mean_JUC,
            class_m2_JUC=self.m2_JUC,
        )  # fmt: skip

    def state(self, way: int, primitive: ClassSums) -> State:
        """The state of one way to label the rows."""
        arrays = {"n": self.n_JUC, "fired": self.fired_JUC, "mean": self.mean_JUC, "m2": self.m2_JUC}
        return _copied({name: arrays[name][way] for name in arrays if name != "m2" or primitive.null_seed is None})


@dataclass(frozen=True, eq=False)
class Kept:
    """The rows kept of every unit, the kinds' places side by side."""

    ranked: Mapping[str, Ranked]
    first: Mapping[str, int]
    count_UC: torch.Tensor
    key_UK: torch.Tensor
    uid_UK: torch.Tensor
    position_UK: torch.Tensor
    value_UK3: torch.Tensor

    @classmethod
    def empty(cls, units: int, primitives: Sequence[Primitive]) -> Kept:
        """No rows, and room for as many as each kind wants."""
        ranked: dict[str, Ranked] = {one.kind: one for one in primitives if isinstance(one, Ranked)}
        first: dict[str, int] = {}
        places = 0
        for kind, one in ranked.items():
            first[kind] = places
            places += _places(one)
        return cls(
            ranked=ranked,
            first=first,
            count_UC=torch.zeros(units, COUNTS, dtype=torch.int64),
            key_UK=torch.zeros(units, places, dtype=torch.int64),
            uid_UK=torch.full((units, places), -1),
            position_UK=torch.full((units, places), -1),
            value_UK3=torch.full((units, places, 3), torch.nan, dtype=torch.float64),
        )

    def bind(self, task: Task) -> None:
        """Let a task grow these."""
        task.keeps, task.places, task.best_match = bool(self.ranked), self.key_UK.shape[1], "match" in self.ranked
        for at, kind in enumerate(KINDS):
            task.keeping.first[at] = self.first.get(kind, 0)
            task.keeping.k[at] = self.ranked[kind].k if kind in self.ranked else 0
            if kind in self.ranked and kind in DRAWN:
                task.keeping.seed = self.ranked[kind].seed
        point(
            task, kept_count_UC=self.count_UC, key_UK=self.key_UK, uid_UK=self.uid_UK, position_UK=self.position_UK,
            value_UK3=self.value_UK3,
        )  # fmt: skip

    def state(self, primitive: Ranked) -> State:
        """The rows kept of one kind."""
        first = self.first[primitive.kind]
        of_kind = slice(first, first + _places(primitive))
        values = dict(zip(("z", "a", "match"), self.value_UK3[:, of_kind].unbind(2), strict=True))
        return _copied({"uid": self.uid_UK[:, of_kind], "position": self.position_UK[:, of_kind], **values})


# kinds whose rows are drawn by a hash
DRAWN = ("random", "octave")


def _places(ranked: Ranked) -> int:
    return ranked.k * (STRATA if ranked.kind == "octave" else 1)


def _copied(tensors: Mapping[str, torch.Tensor]) -> State:
    return {name: value.clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}
