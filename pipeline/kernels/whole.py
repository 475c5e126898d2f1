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

from pipeline.sites import Presentations

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, eq=False)
class Whole:
    """The unmasked presentations of `shown`, one after the other."""

    shown: Presentations

    @cached_property
    def kept(self) -> Array:
        """Index of each unmasked presentation among all (entry · S + position index)."""
        mask = self.shown.mask_LS
        n = self.shown.entries * self.shown.positions
        return np.arange(n) if mask is None else np.flatnonzero(_numpy(mask))

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
        shown = self.shown
        index_LS = np.broadcast_to(np.arange(shown.positions), (shown.entries, shown.positions))
        position_LS = index_LS if shown.position_LS is None else _numpy(shown.position_LS)
        return position_LS.reshape(-1)[self.kept]


def _numpy(value: torch.Tensor) -> Array:
    return np.asarray(value.detach().cpu().numpy())
