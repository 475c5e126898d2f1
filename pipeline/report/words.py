"""What a unit looks for in words: the inputs of its largest weights, and the things of the data that stand out to it.

Layer 5: pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from pipeline.report.printing import cell

# terms of either sign
_TERMS = 5
# how the axes of a pattern are called, from the last one
_AXES = {"pixels": ("column", "row", "slice"), "lags": ("tap",)}

Row = Mapping[str, Any]


def input_name(site: Row, index: int) -> str:
    """What one number of a pattern is called.

    >>> input_name({"input_kind": "pixels", "input_shape": [1, 8, 8]}, 10)
    'row 1, column 2'
    >>> input_name({"input_kind": "lags", "input_shape": [4, 3]}, 5)
    'channel 1, tap 2'
    >>> input_name({"input_kind": "units", "input_shape": [64]}, 5)
    'unit 5'
    """
    if names := site.get("input_names"):
        return str(names[index])
    kind, shape = str(site.get("input_kind") or "inputs"), tuple(site.get("input_shape") or ())
    if kind not in _AXES or len(shape) < 2:
        return f"{kind.removesuffix('s')} {index}"
    axes = ("channel", *reversed(_AXES[kind][: len(shape) - 1]))
    place = zip(axes, np.unravel_index(index, shape), shape, strict=True)
    return ", ".join(f"{axis} {at}" for axis, at, size in place if axis != "channel" or size > 1)


def in_words(site: Row, pattern: Row | None, meanings: Sequence[Row]) -> Table | None:
    """What weighs most for and against the unit; None where nothing is known of it."""
    lines = _of_meanings(meanings) if meanings else _of_weights(site, pattern)
    lines = [(heading, terms) for heading, terms in lines if terms]
    if not lines:
        return None
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for heading, terms in lines:
        table.add_row(heading, Text(", ".join(f"{name} {_signed(value)}" for name, value in terms)))
    return table


def _of_weights(site: Row, pattern: Row | None) -> list[tuple[str, list[tuple[str, float]]]]:
    weight = np.asarray([] if pattern is None or pattern.get("weight") is None else pattern["weight"], dtype=float)
    order = np.argsort(-np.nan_to_num(weight), kind="stable")
    wanted = [int(index) for index in order[:_TERMS] if weight[index] > 0]
    unwanted = [int(index) for index in order[::-1][:_TERMS] if weight[index] < 0]
    named = [[(input_name(site, index), float(weight[index])) for index in some] for some in (wanted, unwanted)]
    return [("looks for", named[0]), ("and not for", named[1])]


def _of_meanings(meanings: Sequence[Row]) -> list[tuple[str, list[tuple[str, float]]]]:
    found = {
        kind: [(str(row["input"]), float(row["value"])) for row in meanings if row["kind"] == kind][:_TERMS]
        for kind in ("greatest", "smallest")
    }
    return [("most for", found["greatest"]), ("least for", found["smallest"])]


def _signed(value: float) -> str:
    return f"{'−' if value < 0 else '+'}{cell(abs(value))}"
