"""The numbers that the native kernel grows: as they begin, and as the states of the primitives that they stand for.

Layer 1: torch. A state is a copy: what is added later does not change it. Here U is the number of units rounded up to
whole vectors of `LANES`: numbers of neighbouring units lie side by side, those beyond the last unit mean nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from pipeline.kernels.base import Primitive, State
from pipeline.kernels.bins import BINS, EMPTY_TOP, Bins
from pipeline.kernels.classsums import ClassSums
from pipeline.kernels.counts import NARROW
from pipeline.kernels.firing import Firing
from pipeline.kernels.matchbins import BINS as MATCH_BINS
from pipeline.kernels.matchbins import MatchBins
from pipeline.kernels.moments import Moments, unsigned
from pipeline.kernels.native_show import point
from pipeline.kernels.native_task import BOUNDS, COUNTED, FORMS, KINDS, LANES, MATCH_MOMENTS, MOMENTS, Task
from pipeline.kernels.ranked import STRATA, Ranked
from pipeline.sites import Site


@dataclass(frozen=True, eq=False)
class Sums:
    """Counts, moments and bins of every unit; F forms of match, each of the silent and of the firing."""

    count_6U: torch.Tensor
    z_7U: torch.Tensor
    a_7U: torch.Tensor
    top_U: torch.Tensor
    bin_UB: torch.Tensor
    undefined_FU: torch.Tensor
    match_FU2B: torch.Tensor
    match_F23U: torch.Tensor

    @classmethod
    def empty(cls, units: int, *, forms: bool) -> Sums:
        """Nothing seen; room for matches only where they are wanted."""
        both, units = len(FORMS) if forms else 0, in_lanes(units)
        moments_7U = torch.zeros(len(MOMENTS), units, dtype=torch.float64)
        moments_7U[0], moments_7U[1] = torch.inf, -torch.inf
        return cls(
            count_6U=torch.zeros(len(COUNTED), units, dtype=torch.int64),
            z_7U=moments_7U,
            a_7U=moments_7U.clone(),
            top_U=torch.full((units,), EMPTY_TOP, dtype=torch.int64),
            bin_UB=torch.zeros(units, BINS, dtype=NARROW),
            undefined_FU=torch.zeros(both, units, dtype=torch.int64),
            match_FU2B=torch.zeros(both, units, 2, MATCH_BINS, dtype=NARROW),
            match_F23U=torch.zeros(both, 2, len(MATCH_MOMENTS), units, dtype=torch.float64),
        )

    def bind(self, task: Task) -> None:
        """Let a task grow these."""
        point(
            task, count_6U=self.count_6U, z_7U=self.z_7U, a_7U=self.a_7U, top_U=self.top_U, bin_UB=self.bin_UB,
            undefined_FU=self.undefined_FU, match_FU2B=self.match_FU2B, match_F23U=self.match_F23U,
        )  # fmt: skip

    def state(self, primitive: Primitive, site: Site) -> State:
        """The state of a primitive that has neither rows nor classes."""
        match primitive:
            case Firing():
                return _copied(dict(zip(COUNTED, self.count_6U, strict=True)), site.units)
            case Moments(quantity):
                moments_7U = self.z_7U if quantity == "z" else self.a_7U
                found = {"n": self.count_6U[0], **dict(zip(MOMENTS, moments_7U, strict=True))}
                return unsigned(_copied({name: found[name] for name in primitive.empty(site)}, site.units))
            case Bins():
                return _copied({"top": self.top_U, "count": self.bin_UB}, site.units)
            case MatchBins(form):
                return _copied(self._match_state(FORMS.index(form)), site.units)
        raise TypeError(f"{primitive} is not among what is summed")

    def _match_state(self, form: int) -> State:
        state = {"undefined": self.undefined_FU[form]}
        for which, name in enumerate(("silent", "fired")):
            _, mean_U, m2_U = self.match_F23U[form, which]
            state |= {f"{name}_count": self.match_FU2B[form, :, which], f"{name}_mean": mean_U, f"{name}_m2": m2_U}
        return state


@dataclass(frozen=True, eq=False)
class ByClass:
    """Rows, firing rows, mean and Σ(a − ā)² of the greatest a of a row, by class; J ways to label rows.

    What a tile T of L units has is one piece of memory: of all classes in few pages.
    """

    n_TJCL: torch.Tensor
    fired_TJCL: torch.Tensor
    mean_TJCL: torch.Tensor
    m2_TJCL: torch.Tensor

    @classmethod
    def empty(cls, units: int, *, ways: int, classes: int) -> ByClass:
        """No rows."""
        shape = (in_lanes(units) // LANES, ways, classes, LANES)
        counts = (torch.zeros(shape, dtype=torch.int64) for _ in range(2))
        return cls(*counts, *(torch.zeros(shape, dtype=torch.float64) for _ in range(2)))

    @property
    def classes(self) -> int:
        """How many classes there is room for."""
        return self.n_TJCL.shape[2]

    def widened(self, classes: int) -> ByClass:
        """The same with room for more classes."""
        more = (0, 0, 0, classes - self.classes)
        arrays = (self.n_TJCL, self.fired_TJCL, self.mean_TJCL, self.m2_TJCL)
        return ByClass(*(torch.nn.functional.pad(value, more) for value in arrays))

    def bind(self, task: Task) -> None:
        """Let a task grow these."""
        task.classes = self.classes
        point(
            task, class_n_TJCL=self.n_TJCL, class_fired_TJCL=self.fired_TJCL, class_mean_TJCL=self.mean_TJCL,
            class_m2_TJCL=self.m2_TJCL,
        )  # fmt: skip

    def state(self, way: int, primitive: ClassSums, site: Site) -> State:
        """The state of one way to label the rows."""
        arrays = {"n": self.n_TJCL, "fired": self.fired_TJCL, "mean": self.mean_TJCL, "m2": self.m2_TJCL}
        wanted = {
            name: value_TJCL[:, way].transpose(1, 2).flatten(0, 1)
            for name, value_TJCL in arrays.items()
            if name != "m2" or primitive.null_seed is None
        }
        return _copied(wanted, site.units)


@dataclass(frozen=True, eq=False)
class Kept:
    """The rows kept of every unit, the kinds' places side by side.

    last_TC2L  key and uid of the last place of each kind and octave C, by tiles T of L units
    """

    ranked: Mapping[str, Ranked]
    first: Mapping[str, int]
    last_TC2L: torch.Tensor
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
        units = in_lanes(units)
        # a kind that is not wanted has no key that is small enough
        none, last = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max
        last_TC2L = torch.full((units // LANES, BOUNDS, 2, LANES), -1)
        for at, kind in enumerate(KINDS):
            bounds = slice(at, BOUNDS if kind == "octave" else at + 1)
            last_TC2L[:, bounds, 0] = last if kind in ranked else none
        return cls(
            ranked=ranked,
            first=first,
            last_TC2L=last_TC2L,
            # of a place without a row the last of all keys
            key_UK=torch.full((units, places), last),
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
            task, last_TC=self.last_TC2L, key_UK=self.key_UK, uid_UK=self.uid_UK, position_UK=self.position_UK,
            value_UK3=self.value_UK3,
        )  # fmt: skip

    def state(self, primitive: Ranked, site: Site) -> State:
        """The rows kept of one kind."""
        first = self.first[primitive.kind]
        of_kind = slice(first, first + _places(primitive))
        values = dict(zip(("z", "a", "match"), self.value_UK3[:, of_kind].unbind(2), strict=True))
        found = {"uid": self.uid_UK[:, of_kind], "position": self.position_UK[:, of_kind], **values}
        return _copied(found, site.units)


# kinds whose rows are drawn by a hash
DRAWN = ("random", "octave")


def _places(ranked: Ranked) -> int:
    return ranked.k * (STRATA if ranked.kind == "octave" else 1)


def in_lanes(units: int) -> int:
    """The number of units, rounded up to whole vectors."""
    return -(-units // LANES) * LANES


def _copied(tensors: Mapping[str, torch.Tensor], units: int) -> State:
    return {name: value[:units].clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}
