"""What each class of rows does to a unit: rows, rows that fire, mean and spread of a.

Layer 1: pure torch, no I/O. Counted per row: a row fires if any of its positions does, and its a is the greatest of
them. Where positions have labels of their own, each is a row of its own. Rows whose label is none of the classes are
left out. The control label′ of a row is drawn from `prior` by the hash of (seed, uid) alone (of a position by that of
(seed, uid, position)), so it is the same under any split, and independent of what the row shows.

Shapes: N rows, U units, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pipeline.counted import counted
from pipeline.errors import JobError
from pipeline.hashing import row_hash
from pipeline.kernels.base import Primitive, State
from pipeline.kernels.by_position import by_position
from pipeline.kernels.moments import merge_central
from pipeline.kernels.view import View
from pipeline.sites import Presentations, Site


@dataclass(frozen=True)
class ClassSums(Primitive):
    """Per unit and class, over rows: n, fired, mean of a, and by true label its m2.

    null_seed  by label′, drawn with this seed; None: by true label
    prior      of label′, as one whole weight per class; equal ones if empty
    The states of data without labels have 0 classes; a state is widened to the classes of the one it is merged with.
    """

    null_seed: int | None = None
    prior: tuple[int, ...] = ()

    def empty(self, site: Site) -> State:
        """No classes yet."""
        counts = {name: torch.zeros(site.units, 0, dtype=torch.int64) for name in ("n", "fired")}
        sums = ("mean", "m2") if self.null_seed is None else ("mean",)
        return counts | {name: torch.zeros(site.units, 0, dtype=torch.float64) for name in sums}

    def observe(self, presentations: Presentations) -> State:
        """One batch, each class centred on its own mean."""
        view = View.of(presentations if presentations.label_LS is None else by_position(presentations))
        if view.label_N is None or view.classes == 0:
            return {name: value.to(view.z_LSU.device) for name, value in self.empty(view.site).items()}
        known_N = (view.label_N >= 0) & (view.label_N < view.classes)
        label_N = view.label_N if self.null_seed is None else self.null_label(view.uid_N, view.classes)
        member_CN = (label_N == torch.arange(view.classes, device=label_N.device)[:, None]) & known_N
        member_CN = member_CN.double()
        found_NU = view.row_a_NU > -torch.inf
        a_NU = view.row_a_NU.masked_fill(~found_NU, 0)
        n_CU = member_CN @ found_NU.double()
        mean_CU = member_CN @ a_NU / n_CU.clamp(min=1)
        state = {
            "n": n_CU.T.long().contiguous(),
            "fired": (member_CN @ view.row_fired_NU.double()).T.long().contiguous(),
            "mean": mean_CU.T.contiguous(),
        }
        if self.null_seed is None:
            rest_NU = (a_NU - member_CN.T @ mean_CU).masked_fill_(~found_NU, 0)
            state["m2"] = (member_CN @ rest_NU.square_()).T.contiguous()
        return state

    def merge(self, left: State, right: State) -> State:
        """The sums, and moments by the pairwise update."""
        classes = max(left["n"].shape[1], right["n"].shape[1])
        left, right = _widened(left, classes), _widened(right, classes)
        counts = {name: left[name] + right[name] for name in ("n", "fired")}
        return counts | merge_central(left, right)

    def null_label(self, uid_N: torch.Tensor, classes: int, bounds: torch.Tensor | None = None) -> torch.Tensor:
        """The class drawn for each uid, int64; `bounds` are those of `bounds`, where they are on its device already."""
        at = self.bounds(classes).to(uid_N.device) if bounds is None else bounds
        return torch.searchsorted(at, row_hash(uid_N, seed=self.null_seed or 0), right=True)

    def bounds(self, classes: int) -> torch.Tensor:
        """The hashes at which the next class begins, int64."""
        prior = self.prior or (1,) * classes
        if len(prior) != classes:
            given, known = counted(len(prior), "weight"), counted(classes, "class")
            raise JobError(f"statistics.labels.prior has {given}, the data has {known}: {prior}")
        # in whole numbers, so that every machine draws the same; what is behind the last weight is never drawn
        last = max(index for index, weight in enumerate(prior) if weight)
        bound_C = [-(-(sum(prior[: index + 1]) << 63) // sum(prior)) for index in range(last)]
        return torch.tensor(bound_C, dtype=torch.int64)


def _widened(state: State, classes: int) -> State:
    return {name: torch.nn.functional.pad(value, (0, classes - value.shape[1])) for name, value in state.items()}
