"""All presentations of a site as plain NumPy arrays: what the definitions of the statistics, the tests' oracles, read.

Layer 1: NumPy float64, no I/O. Nothing here is shared with the kernels, so that a mistake in one shows in the other.

Shapes: P presentations (entry, position), U units, G groups, D fan-in.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from pipeline.hashing import MASK, splitmix64
from pipeline.sites import Presentations

Array = np.ndarray[Any, np.dtype[Any]]

# by which positions are drawn, see `thin.py`
THIN_SEED = 0x70051710


@dataclass(frozen=True, eq=False)
class Whole:
    """The unmasked presentations of `shown`, one after the other; of each entry at most `positions`, drawn by hash."""

    shown: Presentations
    positions: int | None = None

    @cached_property
    def kept(self) -> Array:
        """Index of each of these presentations among all (entry · S + position index)."""
        mask = self.shown.mask_LS
        n = self.shown.entries * self.shown.positions
        kept = np.arange(n) if mask is None else np.flatnonzero(_numpy(mask))
        return kept if self.positions is None else kept[self._drawn(kept, self.positions)]

    def _drawn(self, kept: Array, most: int) -> Array:
        """Places in `kept` of the `most` smallest hashes (row uid, position number) of each entry."""
        entry = kept // max(1, self.shown.positions)
        uid = _numpy(self.shown.uid_N)[_numpy(self.shown.row_index_L)[entry]].tolist()
        number = self._number_LS.reshape(-1)[kept].tolist()
        start = splitmix64(THIN_SEED)
        hashed = [splitmix64(splitmix64((start + at) & MASK) ^ of) for at, of in zip(number, uid, strict=True)]
        found: dict[int, list[int]] = {}
        for place in sorted(range(len(kept)), key=hashed.__getitem__):
            found.setdefault(int(entry[place]), []).append(place)
        return np.array(sorted(place for places in found.values() for place in places[:most]), dtype=int)

    def _flat(self, value_LSK: torch.Tensor) -> Array:
        return _numpy(value_LSK).reshape(-1, value_LSK.shape[2])[self.kept]

    @cached_property
    def z_PU(self) -> Array:
        """The gate's input, float64."""
        return self._flat(self.shown.z_LSU.double())

    @cached_property
    def a_PU(self) -> Array:
        """The gate's output, float64."""
        return self._flat(self.shown.a_LSU.double())

    @cached_property
    def affine_PU(self) -> Array:
        """w·x + b, float64."""
        return self.z_PU if self.shown.affine_LSU is None else self._flat(self.shown.affine_LSU.double())

    @cached_property
    def x_PGD(self) -> Array:
        """The inputs, float64."""
        x = self.shown.patches(0, self.shown.entries).double()
        return _numpy(x).reshape(-1, *x.shape[2:])[self.kept]

    @cached_property
    def valid_PU(self) -> Array:
        """Where z and a are finite."""
        return np.isfinite(self.z_PU) & np.isfinite(self.a_PU)

    @cached_property
    def row_P(self) -> Array:
        """The row of each presentation."""
        return np.repeat(_numpy(self.shown.row_index_L), self.shown.positions)[self.kept]

    @cached_property
    def uid_P(self) -> Array:
        """The uid of each presentation's row."""
        return _numpy(self.shown.uid_N)[self.row_P]

    @cached_property
    def position_P(self) -> Array:
        """The number of each presentation within its row."""
        return self._number_LS.reshape(-1)[self.kept]

    @property
    def _number_LS(self) -> Array:
        shown = self.shown
        if shown.position_LS is not None:
            return _numpy(shown.position_LS)
        return np.broadcast_to(np.arange(shown.positions), (shown.entries, shown.positions))


def _numpy(value: torch.Tensor) -> Array:
    return np.asarray(value.detach().cpu().numpy())
