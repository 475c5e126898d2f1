"""What a site was shown and made of it, and one unit's part of that beside its row of `neurons`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray
Row = dict[str, Any]
KEYS = {"run", "model", "data", "split", "site", "unit"}
M64 = (1 << 64) - 1
QUANTILES = {"q001": 0.001, "q01": 0.01, "q05": 0.05, "q25": 0.25, "q50": 0.5, "q75": 0.75, "q95": 0.95, "q99": 0.99,
             "q999": 0.999}  # fmt: skip


@dataclass
class Raw:
    """What a site was shown and made of it, captured by other means than the program's.

    z, a (N, S, U); x (N, S, G, D); w (U, D), b (U): in the space of x, norms folded in; label (N) of rows or label_at
    (N, S) of positions; mask (N, S), True where a position is real; gradient (N, S, U) of the sum of the rows' losses
    at a; `contributors` says which inputs of a unit are one source: by unit u and input d its number in the table of
    edges.
    """

    z: Array
    a: Array
    x: Array
    w: Array
    b: Array
    uid: Array
    fires: bool
    non_negative: bool
    label: Array | None = None
    label_at: Array | None = None
    classes: int = 0
    mask: Array | None = None
    gradient: Array | None = None
    raw_w: Array | None = None
    up_w: Array | None = None
    twin_w: Array | None = None
    contributors: Callable[[int, int], int] = lambda unit, number: number

    @property
    def group(self) -> Array:
        """The group of each unit."""
        return np.arange(len(self.w)) // (len(self.w) // self.x.shape[2])


def splitmix(value: int) -> int:
    """Vigna's generator without its sign bit."""
    z = (value + 0x9E3779B97F4A7C15) & M64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & M64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & M64
    return (z ^ (z >> 31)) & (M64 >> 1)


def draw(seed: int, unit: int, uid: int) -> int:
    """The hash by which rows are drawn."""
    return splitmix(splitmix((splitmix(seed) + unit) & M64) ^ uid)


def near(got: float | None, wanted: float, allowed: float, what: str) -> None:
    """Within the tolerance, and undefined where it should be."""
    assert got is not None, f"{what} is null"
    both_undefined = math.isnan(wanted) and math.isnan(got)
    assert both_undefined or abs(got - wanted) <= allowed, f"{what}: {got} is not {wanted} to {allowed}"


def cos(left: Array, right: Array) -> float:
    norms = np.linalg.norm(left) * np.linalg.norm(right)
    return float(np.clip(left @ right / norms, -1, 1)) if norms else math.nan


class Unit:
    """One unit's presentations that count, and its row of `neurons`."""

    def __init__(self, raw: Raw, unit: int, row: Row) -> None:
        self.raw, self.unit, self.row = raw, unit, row
        self.left = {name for name in row if name not in KEYS and not name.endswith("_se")}
        shown = np.ones(raw.z.shape[:2], bool) if raw.mask is None else raw.mask
        self.valid = shown & np.isfinite(raw.z[..., unit]) & np.isfinite(raw.a[..., unit])
        self.shown = int(shown.sum())
        self.n_at, self.s_at = self.valid.nonzero()
        self.z, self.a = raw.z[self.valid][:, unit], raw.a[self.valid][:, unit]
        self.x = raw.x[self.valid][:, raw.group[unit]]
        self.w, self.b = raw.w[unit], float(raw.b[unit])
        self.fired = self.z > 0

    def take(self, name: str) -> Any:
        self.left.discard(name)
        return self.row[name]

    def null(self, *names: str) -> None:
        for name in names:
            assert self.take(name) is None, f"{name}: {self.row[name]} is not null"

    def exactly(self, name: str, wanted: Any) -> None:
        got = self.take(name)
        same = got is None if wanted is None else got == wanted or (got != got and wanted != wanted)
        assert same, f"unit {self.unit} {name}: {got} is not {wanted}"

    def close(self, name: str, wanted: float, allowed: float) -> None:
        near(self.take(name), float(wanted), allowed, f"unit {self.unit} {name}")

    def relative(self, name: str, wanted: float, allowed: float = 1e-9, floor: float = 1e-3) -> None:
        self.close(name, wanted, allowed * max(abs(wanted), floor) if wanted == wanted else 0)


def kept_inputs(one: Unit) -> tuple[Array, Array, Array]:
    """x, a and whether it fires of the presentations whose x is finite too."""
    finite = np.isfinite(one.x).all(1)
    return one.x[finite], one.a[finite], one.fired[finite]
