"""The rows chosen of every kind."""

from __future__ import annotations

import math
from collections.abc import Callable

import pandas as pd

from tests.statistics.recompute.match import matches
from tests.statistics.recompute.raw import Row, Unit, draw, near

EXEMPLAR_SEED = 0xE8E3
KEPT, PER_OCTAVE = 10, 2


def presentations(one: Unit) -> list[Row]:
    m = matches("pearson", one.z, one.x, one.w, one.b)
    uid = one.raw.uid[one.n_at]
    return [
        {"uid": int(uid[p]), "position": int(one.s_at[p]), "z": one.z[p], "a": one.a[p], "match": m[p]}
        for p in range(len(one.z))
    ]


def representatives(shown: list[Row], key: Callable[[Row], float]) -> list[Row]:
    """Of each row the presentation with the smallest key, of equals the smallest position."""
    found: dict[int, Row] = {}
    for row in sorted(shown, key=lambda row: (key(row), row["position"])):
        found.setdefault(row["uid"], row)
    return list(found.values())


def octave(z: float) -> tuple[bool, int]:
    exponent = min(max(math.frexp(z)[1] - 1, -8), 7) if z else -8
    return z >= 0, exponent if z >= 0 else -exponent


def chosen(kind: str, unit: int, shown: list[Row]) -> list[Row]:
    if kind == "smallest":
        return sorted(representatives(shown, lambda row: row["z"]), key=lambda row: (row["z"], row["uid"]))[:KEPT]
    if kind == "match":
        known = representatives([row for row in shown if not math.isnan(row["match"])], lambda row: -row["match"])
        return sorted(known, key=lambda row: (-row["match"], row["uid"]))[:KEPT]
    rows = representatives(shown, lambda row: -row["z"])
    if kind == "greatest":
        return sorted(rows, key=lambda row: (-row["z"], row["uid"]))[:KEPT]
    rows.sort(key=lambda row: draw(EXEMPLAR_SEED, unit, row["uid"]))
    if kind == "random":
        return [row for row in rows if row["z"] > 0][:KEPT]
    octaves = sorted({octave(row["z"]) for row in rows})
    return [row for which in octaves for row in [one for one in rows if octave(one["z"]) == which][:PER_OCTAVE]]


def check_exemplars(one: Unit, exemplars: pd.DataFrame) -> None:
    shown = presentations(one)
    own = exemplars[exemplars["unit"] == one.unit]
    kinds = ["greatest", "smallest", "match", "octave", *(["random"] if one.raw.fires else [])]
    assert set(own["kind"]) <= set(kinds)
    for kind in kinds:
        got = own[own["kind"] == kind].sort_values("rank").to_dict("records")
        wanted = chosen(kind, one.unit, shown)
        assert [row["rank"] for row in got] == list(range(len(wanted))), kind
        for ours, theirs in zip(got, wanted, strict=True):
            near(ours["match"], theirs["match"], 1e-9, f"exemplars.match of {kind}")
            if kind == "match" and (ours["uid"], ours["position"]) != (theirs["uid"], theirs["position"]):
                continue  # a match that differs in its last bit only: the value was compared
            for name in ("uid", "position", "z", "a"):
                assert ours[name] == theirs[name], (one.unit, kind, ours, theirs)
