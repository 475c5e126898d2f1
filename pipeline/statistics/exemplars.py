"""The rows that stand for a unit: what drives it most and least, what matches it best, and what it fires for at large.

Layer 2: pure torch; imports `base`, `kernels` and what is below. One presentation per row; ties go to the smaller uid,
then the smaller position.

Shapes: P presentations, U units, K kept rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pipeline.columns import Column
from pipeline.hashing import MASK, splitmix64
from pipeline.kernels.base import Primitive, State
from pipeline.kernels.ranked import Kind, Ranked
from pipeline.kernels.whole import Array, Whole
from pipeline.sites import Presentations, Site
from pipeline.statistics.base import Controls, Rows, Statistic, Values, at_least, part

SEED = 0xE8E3
KINDS: tuple[Kind, ...] = ("greatest", "smallest", "match", "random", "octave")

COLUMNS = (
    Column("kind", "string", "Why the row was chosen: greatest or smallest z, best match, drawn from those that fire "
           "(random), drawn from an octave of z.", "name", "greatest, smallest, match, random, octave",
           table="exemplars"),
    Column("rank", "int32", "Place within unit and kind, from 0; octaves follow each other by rising z.", "index",
           "≥ 0", table="exemplars"),
    Column("uid", "int64", "The row.", "row uid", "≥ 0",
           formula="least −z, z, −match, or splitmix64(splitmix64(splitmix64(seed) + unit) ^ uid), "
                   f"seed = 0x{SEED:X}; then uid",
           table="exemplars"),
    Column("position", "int64", "Which position of the row: where z is greatest (smallest, or the match best).",
           "index", "≥ 0", formula="argmax over positions of z (−z, match), the least of equals", table="exemplars"),
    Column("z", "float64", "The gate's input there.", "z", formula="z(uid, position)", table="exemplars"),
    Column("a", "float64", "The gate's output there.", "a", formula="a(uid, position)", table="exemplars"),
    Column("match", "float64", "Correlation of input and pattern there.", "1", "[−1, 1]",
           "NaN where undefined: x or w constant, fewer than 3 inputs, or w·x or Σx² not finite",
           "(w·x − w̄·Σx)/(‖x − x̄‖·‖w − w̄‖)", table="exemplars"),
)  # fmt: skip


@dataclass(frozen=True)
class Exemplars(Statistic):
    """Rows that stand for each unit.

    k           rows kept of each kind
    per_octave  rows kept of each of the 32 octaves of z: |z| in [2⁻⁸, 2⁸) by sign, what is beyond with the outermost
    """

    k: int = at_least(1, 10)
    per_octave: int = at_least(1, 2)

    name = "exemplars"
    version = 1
    COLUMNS = COLUMNS

    def primitives(self, site: Site) -> Mapping[str, Primitive]:
        """One ranking per kind; none of firing rows where nothing fires."""
        kinds = [kind for kind in KINDS if kind != "random" or site.fires]
        return {kind: Ranked(kind, self.per_octave if kind == "octave" else self.k, SEED) for kind in kinds}

    def columns(self, site: Site, state: State, controls: Controls) -> Rows:
        """The kept rows, by kind, unit and rank."""
        found: dict[str, list[torch.Tensor]] = {}
        kinds: list[str] = []
        for kind in self.primitives(site):
            kept = part(state, kind)
            unit, column = (kept["uid"] >= 0).nonzero(as_tuple=True)
            rank_UK = (kept["uid"] >= 0).cumsum(1) - 1
            one = {"unit": unit, "rank": rank_UK[unit, column]}
            for name, values in (one | {name: value[unit, column] for name, value in kept.items()}).items():
                found.setdefault(name, []).append(values)
            kinds += [kind] * len(unit)
        rows: dict[str, Values] = {name: torch.cat(values) for name, values in found.items()}
        return {"exemplars": rows | {"kind": kinds}}

    def define(self, site: Site, whole: Presentations, controls: Controls) -> Rows:
        """By sorting all rows, in Python."""
        rows: list[dict[str, Any]] = []
        for unit in range(site.units):
            shown = _define_presentations(Whole(whole), unit)
            for kind in self.primitives(site):
                k = self.per_octave if kind == "octave" else self.k
                chosen = _define_choice(kind, k, unit, shown)
                rows += [{"unit": unit, "kind": kind, "rank": rank, **row} for rank, row in enumerate(chosen)]
        names = ("unit", "rank", "uid", "position", "z", "a", "match")
        dtypes = [torch.float64 if name in ("z", "a", "match") else torch.int64 for name in names]
        columns: dict[str, Values] = {
            name: torch.tensor([row[name] for row in rows], dtype=dtype)
            for name, dtype in zip(names, dtypes, strict=True)
        }
        return {"exemplars": columns | {"kind": [row["kind"] for row in rows]}}


STATISTIC = Exemplars()

Row = dict[str, Any]


def _define_presentations(whole: Whole, unit: int) -> list[Row]:
    """Every presentation that counts for the unit."""
    site = whole.shown.site
    w_D, x_PD = site.pattern_UD[unit].numpy(), whole.x_PGD[:, unit // (site.units // site.groups)]
    product_P = whole.affine_PU[:, unit] - float(site.bias_U[unit])
    return [
        {
            "uid": int(whole.uid_P[p]),
            "position": int(whole.position_P[p]),
            "z": float(whole.z_PU[p, unit]),
            "a": float(whole.a_PU[p, unit]),
            "match": _define_correlation(product_P[p], x_PD[p], w_D),
        }
        for p in np.flatnonzero(whole.valid_PU[:, unit])
    ]


def _define_correlation(product: float, x_D: Array, w_D: Array) -> float:
    with np.errstate(all="ignore"):
        square, spread = (x_D * x_D).sum(), ((x_D - x_D.mean()) ** 2).sum()
        w_square, w_spread = (w_D * w_D).sum(), ((w_D - w_D.mean()) ** 2).sum()
        varied = spread > 2.0**-40 * square and w_spread > 2.0**-40 * w_square
        if len(w_D) < 3 or not varied or not np.isfinite(square):
            return float("nan")
        correlation = (product - w_D.mean() * x_D.sum()) / np.sqrt(w_spread) / np.sqrt(spread)
        return float(np.clip(correlation, -1, 1))


def _define_choice(kind: str, k: int, unit: int, shown: list[Row]) -> list[Row]:
    sign, name = {"smallest": (1, "z"), "match": (-1, "match")}.get(kind, (-1, "z"))
    candidates = [row for row in shown if not np.isnan(row[name])]
    of_row: dict[int, Row] = {}
    for row in sorted(candidates, key=lambda row: (sign * row[name], row["position"])):
        of_row.setdefault(row["uid"], row)
    rows = list(of_row.values())
    if kind in ("greatest", "smallest", "match"):
        return sorted(rows, key=lambda row: (sign * row[name], row["uid"]))[:k]
    start = splitmix64((splitmix64(SEED) + unit) & MASK)
    drawn = sorted(rows, key=lambda row: splitmix64(start ^ row["uid"]))
    if kind == "random":
        return [row for row in drawn if row["z"] > 0][:k]
    octaves = [[row for row in drawn if _define_octave(row["z"]) == octave][:k] for octave in range(-16, 17) if octave]
    return [row for octave in octaves for row in octave]


def _define_octave(z: float) -> int:
    """Number of the octave of z, rising with z and never 0."""
    exponent = min(max(int(np.floor(np.log2(abs(z)))), -8), 7) if z else -8
    return exponent + 9 if z >= 0 else -(exponent + 9)
