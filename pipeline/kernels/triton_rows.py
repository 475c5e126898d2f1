"""The rows that the kernel for GPUs keeps of each unit, and how a batch's are offered to them.

Layer 1: torch and Triton; only to be imported where that is installed. Places are held in no order, and put in that
of the reference when the state is asked for.

Shapes: N rows, U units, K places of kept rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton

from pipeline.hashing import splitmix64
from pipeline.kernels.base import State
from pipeline.kernels.places import Places
from pipeline.kernels.ranked import STRATA, Ranked
from pipeline.kernels.triton_keep import keep
from pipeline.kernels.view import View

# the key and the uid of a place that is free: no row's are greater
FREE = (1 << 63) - 1
# units and octaves that a program offers rows to, and rows that it has in hand
UNITS, OCTAVES, ROWS = 4, 1, 512
DRAWN = ("random", "octave")
# which of a view's places stand for a row
PLACES = {"smallest": "smallest", "match": "best_match"}


class Rows:
    """The rows kept for one kind."""

    def __init__(self, kind: Ranked, units: int, device: torch.device) -> None:
        self.kind = kind
        self._strata = STRATA if kind.kind == "octave" else 1
        shape = (units, self._strata * kind.k)
        self._key_UK = torch.full(shape, FREE, device=device)
        self._uid_UK = torch.full(shape, FREE, device=device)
        self._position_UK = torch.full(shape, -1, device=device)
        self._values = [torch.full(shape, torch.nan, dtype=torch.float64, device=device) for _ in range(3)]

    def offer(self, view: View, arguments: Mapping[str, Any]) -> None:
        """Keep those of a batch's rows that are better; `arguments` are those of the pass."""
        if self.kind.k == 0:
            return
        places: Places = getattr(view, PLACES.get(self.kind.kind, "greatest"))
        names = ("memory", "by", "lengths", "patterns", "positions", "units", "per_group", "groups")
        flags = ("A_IS", "HAS_Y", "HAS_NUMBER")
        z_UK, a_UK, match_UK = self._values
        octaves = min(OCTAVES, self._strata)
        keep[(triton.cdiv(arguments["units"], UNITS), self._strata // octaves)](
            **{name: arguments[name] for name in (*names, *flags)},
            value_NU=places.value_NU.contiguous(),
            uid_N=view.uid_N,
            entry_NU=places.entry_NU.contiguous() if view.row_L is not None else view.uid_N,
            index_NU=places.index_NU.contiguous(),
            key_UK=self._key_UK,
            uid_UK=self._uid_UK,
            position_UK=self._position_UK,
            z_UK=z_UK,
            a_UK=a_UK,
            match_UK=match_UK,
            rows=view.rows,
            start=splitmix64(self.kind.seed),
            SPREAD=view.row_L is not None,
            HASHED=self.kind.kind in DRAWN,
            FIRING=self.kind.kind == "random",
            STRATA=self._strata,
            K=self.kind.k,
            KP=triton.next_power_of_2(self.kind.k),
            BN=min(ROWS, triton.next_power_of_2(view.rows)),
            BU=UNITS,
            SP=octaves,
            enable_fp_fusion=False,
        )

    def state(self) -> State:
        """The rows of each octave in the order of the reference: by key, of equals the smaller uid."""
        places = (-1, self._strata, self.kind.k)
        by_uid = self._uid_UK.view(places).argsort(dim=2, stable=True)
        order = by_uid.gather(2, self._key_UK.view(places).gather(2, by_uid).argsort(dim=2, stable=True))
        tensors = dict(zip(("z", "a", "match"), self._values, strict=True))
        held = {"uid": self._uid_UK, "position": self._position_UK, **tensors}
        found = {name: value.view(places).gather(2, order).flatten(1) for name, value in held.items()}
        return found | {"uid": found["uid"].masked_fill(found["uid"] == FREE, -1)}
