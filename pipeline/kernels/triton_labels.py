"""What is counted by rows on a GPU, and how a batch is added to it.

Layer 1: torch and Triton; only to be imported where that is installed.

Shapes: N rows, U units, C classes, P kinds of labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import triton

from pipeline.kernels.base import State
from pipeline.kernels.classsums import ClassSums
from pipeline.kernels.places import Places
from pipeline.kernels.triton_classes import by_row
from pipeline.kernels.view import View

# classes that a program has in hand, and rows and units: where it has all classes it waits for each run of rows, so of
# those many; where others read the same rows for other classes, they are read in one piece
CLASSES = 16
FEW, MANY = (64, 2), (16, 16)
COUNTS, SUMS = ("n", "fired"), ("mean", "m2")


class ByRow:
    """Rows with a presentation that counts, rows that fire, and the sums by class for each kind of labels."""

    def __init__(self, kinds: Sequence[ClassSums], units: int, device: torch.device) -> None:
        self._kinds = tuple(kinds)
        self._device = device
        self.rows_2U = torch.zeros(2, units, dtype=torch.int64, device=device)
        self._classes = self._wide(units, 0)
        # how often there was made room for more classes
        self.widened = 0
        self._bounds: dict[tuple[ClassSums, int], torch.Tensor] = {}

    def _wide(self, units: int, classes: int) -> dict[str, torch.Tensor]:
        """Room for so many classes."""
        shape = (len(self._kinds), units, classes)
        counts = {name: torch.zeros(shape, dtype=torch.int64, device=self._device) for name in COUNTS}
        return counts | {name: torch.zeros(shape, dtype=torch.float64, device=self._device) for name in SUMS}

    def expect(self, view: View) -> None:
        """Have room for the classes of a batch, whether it has presentations or not."""
        before = self._classes
        units, known = before["n"].shape[1:]
        if self._kinds and view.label_N is not None and view.classes > known:
            self._classes = self._wide(units, view.classes)
            self.widened += 1
            for name, value in before.items():
                self._classes[name][..., :known] = value

    def add(self, view: View, greatest: Places, output_NU: torch.Tensor) -> None:
        """Add a batch from each row's greatest z and a, −∞ where it has none."""
        units, classes = self._classes["n"].shape[1:]
        labelled = view.label_N is not None and view.classes > 0 and bool(self._kinds)
        label_PN = view.remembered((self._kinds, view.classes), lambda: self._labels(view)) if labelled else view.uid_N
        rows, near = FEW if classes <= CLASSES else MANY
        room = {"BN": rows, "BC": CLASSES, "BU": near, "enable_fp_fusion": False}
        grid = (triton.cdiv(units, near), *((triton.cdiv(classes, CLASSES), len(self._kinds)) if labelled else (1, 1)))
        by_row[grid](
            greatest.value_NU.contiguous(), output_NU.contiguous(), label_PN, self.rows_2U,
            *(self._classes[name] for name in (*COUNTS, *SUMS)), view.rows, units, classes, CLASSES=labelled, **room,
        )  # fmt: skip

    def _labels(self, view: View) -> torch.Tensor:
        """The labels of each kind, −1 where the true one is none of the classes: (P, N)."""
        label_N, classes = view.label_N, view.classes
        assert label_N is not None
        known_N = (label_N >= 0) & (label_N < classes)
        drawn = [label_N if one.null_seed is None else self._drawn(one, view.uid_N, classes) for one in self._kinds]
        return torch.stack([one.masked_fill(~known_N, -1) for one in drawn])

    def _drawn(self, kind: ClassSums, uid_N: torch.Tensor, classes: int) -> torch.Tensor:
        if (kind, classes) not in self._bounds:
            self._bounds[kind, classes] = kind.bounds(classes).to(uid_N.device)
        return kind.null_label(uid_N, classes, self._bounds[kind, classes])

    def of_classes(self, kind: ClassSums) -> State:
        """The state of one kind of labels."""
        names: Mapping[str, torch.Tensor] = {
            name: value for name, value in self._classes.items() if name != "m2" or kind.null_seed is None
        }
        return {name: value[self._kinds.index(kind)].clone() for name, value in names.items()}
