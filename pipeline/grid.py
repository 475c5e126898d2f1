"""Grids of settings: every combination of lists of values, each under a name that people can read.

Layer 0: pure; knows no setting.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

Point = dict[str, Any]


def points(grids: Sequence[Mapping[str, Sequence[Any]]]) -> tuple[Point, ...]:
    """Every combination of each grid, the last key changing fastest; without a grid the one point that sets nothing.

    >>> points([{"width": (8, 16), "learning_rate": (0.1,)}, {"width": (32,)}])
    ({'width': 8, 'learning_rate': 0.1}, {'width': 16, 'learning_rate': 0.1}, {'width': 32})
    >>> points([])
    ({},)
    """
    if not grids:
        return ({},)
    return tuple(dict(zip(grid, values, strict=True)) for grid in grids for values in product(*grid.values()))


def label(point: Point) -> str:
    """What a point is called in a model's name.

    >>> label({"learning_rate": 0.05, "widths": (128, 64), "schedule": "cosine"})
    'learning_rate=0.05,widths=128x64,schedule=cosine'
    """
    return ",".join(f"{key}={_written(value)}" for key, value in point.items())


def _written(value: Any) -> str:
    if isinstance(value, tuple):
        return "x".join(map(_written, value)) or "none"
    return str(value).lower() if isinstance(value, bool) else f"{value}"
