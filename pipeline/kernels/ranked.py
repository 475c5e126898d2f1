"""The rows that stand for a unit: those it answers most and least, those that match best, and some drawn by hash.

Layer 1: pure torch, no I/O. A row is represented by one presentation and ranked by a key; equal keys by the smaller
uid. Exact and free of order: the k first of a set are the k first of the k firsts of its parts. Drawing takes the
smallest hashes of (seed, unit, uid), which a reservoir could not do in any order.

Shapes: N rows, U units, K kept rows, M candidates of a unit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from pipeline.hashing import row_hash
from pipeline.input_forms import InputSums
from pipeline.kernels.base import Primitive, State
from pipeline.kernels.bins import lattice
from pipeline.kernels.match import match
from pipeline.kernels.places import Places, position_at
from pipeline.kernels.view import View, fill_unless
from pipeline.sites import Presentations, Site

# greatest, smallest: by z; match: by correlation; random: of the firing rows; octave: of each octave of z
Kind = Literal["greatest", "smallest", "match", "random", "octave"]

# octaves of |z| from 2⁻⁸ to 2⁸ on either side of zero; smaller and larger ones join the outermost
LEAST_OCTAVE, LAST_OCTAVE = -8, 7
STRATA = 2 * (LAST_OCTAVE - LEAST_OCTAVE + 1)
_NAMES = ("uid", "position", "z", "a", "match")


@dataclass(frozen=True)
class Ranked(Primitive):
    """Per unit the first `k` rows (of each octave) by the key of `kind`.

    State, (U, K): uid (−1 where there are fewer rows), position (−1), and z, a, match (NaN where undefined).
    A row is represented by its greatest z; for "smallest" by its smallest, for "match" by its best match.
    """

    kind: Kind
    k: int
    seed: int = 0

    @property
    def _strata(self) -> int:
        return STRATA if self.kind == "octave" else 1

    def empty(self, site: Site) -> State:
        """No rows."""
        shape = (site.units, self._strata * self.k)
        numbers = {name: torch.full(shape, -1) for name in ("uid", "position")}
        return numbers | {name: torch.full(shape, torch.nan, dtype=torch.float64) for name in ("z", "a", "match")}

    def observe(self, presentations: Presentations) -> State:
        """The first rows of one batch."""
        view = View.of(presentations)
        places = self._places(view)
        found_NU = places.found_NU & view.row_fired_NU if self.kind == "random" else places.found_NU
        by_uid_N = view.uid_N.argsort()
        place_UN = self._stratum(view.greatest.value_NU).masked_fill(~found_NU, -1)[by_uid_N].T
        index_UK = self._first(self._key_of(view, places)[by_uid_N].T, place_UN)
        row_KU = by_uid_N[index_UK.clamp(min=0)].T if view.rows else torch.zeros_like(index_UK.T)
        return _masked(_described(view, places, row_KU), index_UK < 0)

    def merge(self, left: State, right: State) -> State:
        """The first rows of both."""
        both = {name: torch.cat([left[name], right[name]], 1) for name in _NAMES}
        by_uid_UM = both["uid"].argsort(dim=1, stable=True)
        both = {name: value.gather(1, by_uid_UM) for name, value in both.items()}
        place_UM = self._stratum(both["z"]).masked_fill(both["uid"] < 0, -1)
        index_UK = self._first(self._key_of_state(both), place_UM)
        return _masked({name: value.gather(1, index_UK.clamp(min=0)) for name, value in both.items()}, index_UK < 0)

    def _places(self, view: View) -> Places:
        if self.kind == "smallest":
            return view.smallest
        return view.best_match if self.kind == "match" else view.greatest

    def _key_of(self, view: View, places: Places) -> torch.Tensor:
        """What rows are ranked by, the smallest first."""
        # a place of "smallest" is where −z is greatest
        return view.hash_NU(self.seed) if self.kind in ("random", "octave") else -places.value_NU

    def _key_of_state(self, state: State) -> torch.Tensor:
        if self.kind == "smallest":
            return state["z"]
        if self.kind in ("greatest", "match"):
            return -state["z" if self.kind == "greatest" else "match"]
        unit_U1 = torch.arange(len(state["uid"]), device=state["uid"].device)[:, None]
        return row_hash(state["uid"], seed=self.seed, unit=unit_U1)

    def _stratum(self, z: torch.Tensor) -> torch.Tensor:
        if self.kind != "octave":
            return torch.zeros_like(z, dtype=torch.int64)
        octave = lattice(z, 0).clamp(LEAST_OCTAVE, LAST_OCTAVE)
        return torch.where(z < 0, LAST_OCTAVE - octave, STRATA // 2 + octave - LEAST_OCTAVE)

    def _first(self, key_UM: torch.Tensor, stratum_UM: torch.Tensor) -> torch.Tensor:
        """Index of the k smallest keys of each stratum (−1: none), of equals the first; stratum −1 is no candidate."""
        strata, last = self._strata, torch.inf if key_UM.is_floating_point() else torch.iinfo(key_UM.dtype).max
        order_UM = key_UM.masked_fill(stratum_UM < 0, last).argsort(dim=1, stable=True)
        if strata > 1:
            candidate_UM = stratum_UM.masked_fill(stratum_UM < 0, strata).gather(1, order_UM)
            order_UM = order_UM.gather(1, candidate_UM.argsort(dim=1, stable=True))
        else:
            order_UM = order_UM[:, : self.k]
        sorted_UM = stratum_UM.gather(1, order_UM)
        sorted_UM = sorted_UM.masked_fill(sorted_UM < 0, strata).contiguous()
        rank_UM = torch.arange(sorted_UM.shape[1], device=key_UM.device) - torch.searchsorted(sorted_UM, sorted_UM)
        kept_UM = (rank_UM < self.k) & (sorted_UM < strata)
        slot_UM = torch.where(kept_UM, sorted_UM * self.k + rank_UM, strata * self.k)
        index_UK = torch.full((len(key_UM), strata * self.k + 1), -1, device=key_UM.device)
        return index_UK.scatter_(1, slot_UM, order_UM)[:, :-1]


def _described(view: View, places: Places, row_KU: torch.Tensor) -> State:
    """uid, position, z, a and match of each chosen row at its place, as (U, K)."""
    shape_UK = row_KU.T.shape
    if not view.rows or not view.entries:
        return {name: torch.zeros(shape_UK, dtype=torch.int64 if i < 2 else torch.float64, device=row_KU.device)
                for i, name in enumerate(_NAMES)}  # fmt: skip
    entry_KU, index_KU = places.entry_NU.gather(0, row_KU), places.index_NU.gather(0, row_KU)
    at = Places(row_KU, entry_KU, index_KU)
    affine_KU = at.of(view.z_LSU if view.affine_LSU is None else view.affine_LSU).double()
    sums, group_U = view.input_sums(), view.site.numbers_on(row_KU.device).group_U
    sums_KU = InputSums(
        *(one[entry_KU, index_KU, group_U] for one in (sums.sum_LSG, sums.square_LSG, sums.centred_LSG))
    )
    found = match(view.site, "pearson", affine_KU, sums_KU)
    described = {
        "uid": view.uid_N[row_KU],
        "position": position_at(view, entry_KU, index_KU),
        "z": at.of(view.z_LSU).double(),
        "a": at.of(view.a_LSU).double(),
        "match": fill_unless(found.defined, found.value, torch.nan),
    }
    return {name: value.T.contiguous() for name, value in described.items()}


def _masked(state: State, none_UK: torch.Tensor) -> State:
    return {
        name: value.masked_fill(none_UK, torch.nan if value.is_floating_point() else -1)
        for name, value in state.items()
    }
