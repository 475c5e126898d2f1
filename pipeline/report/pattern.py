"""A unit's pattern w, what drives it, and the mean of what fires it: as pictures, or as the largest terms by name.

Layer 5: pure. Pixels and channels × lags are pictures, one for each leading channel; other inputs are listed with bars.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pipeline.report.picture import ASCII_LEGEND, COLOUR_LEGEND, picture
from pipeline.report.printing import cell, column_cells
from pipeline.report.words import input_name

# channels and terms shown at most: those of the largest weight
_CHANNELS = 8
_TERMS = 12
_GAP = 2
_PICTURED = ("pixels", "lags")
_LABEL_WIDTH = 12
_WIDEST = 32
_LONGEST_BAR = 8

Vectors = dict[str, np.ndarray]


def pattern_picture(site: Mapping[str, Any], pattern: Mapping[str, Any], *, width: int, colour: bool) -> RenderableType:
    """Lay out the vectors of one unit in at most `width` characters."""
    vectors = _vectors(pattern)
    shape = tuple(site["input_shape"] or (len(vectors["w"]),))
    extended = shape[next((i for i, size in enumerate(shape) if size > 1), len(shape) - 1) :]
    if len(extended) < 2 or site["input_kind"] not in _PICTURED:
        return _terms(site, vectors, width)
    images = {title: vector.reshape(-1, *extended[-2:]) for title, vector in vectors.items()}
    drawn = _side_by_side(images, width, colour) if len(images["w"]) == 1 else _by_channel(images, width, colour)
    legend = f"{COLOUR_LEGEND if colour else ASCII_LEGEND}; ± is the end of the scale"
    return Group(drawn, Text(legend, style="dim"))


def _vectors(pattern: Mapping[str, Any]) -> Vectors:
    """The vectors that are defined, by what they are called."""
    found = {
        "w": pattern.get("weight"),
        "Cov(a,x)": pattern.get("cov"),
        "E[x|fires]": _sum(pattern.get("mean_x"), pattern.get("sta")),
    }
    arrays = {title: np.asarray(values, dtype=float) for title, values in found.items() if values is not None}
    return {title: values for title, values in arrays.items() if title == "w" or np.isfinite(values).any()}


def _sum(mean: list[float] | None, difference: list[float] | None) -> np.ndarray | None:
    """E[x | fires] from E[x] and E[x | fires] − E[x]."""
    return None if mean is None or difference is None else np.asarray(mean) + np.asarray(difference)


def _side_by_side(images: Vectors, width: int, colour: bool) -> RenderableType:
    each = min(_WIDEST, (width - _GAP * (len(images) - 1)) // len(images))
    grid = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="")
    for title, image in images.items():
        grid.add_column(Text(f"{title}  ±{cell(_largest(image))}"), no_wrap=True)
    grid.add_row(*(Text("\n").join(picture(image[0], colour=colour, width=each)) for image in images.values()))
    return grid


def _by_channel(images: Vectors, width: int, colour: bool) -> RenderableType:
    """A column for each channel of large weight, a line of pictures for each vector."""
    norms = np.linalg.norm(images["w"].reshape(len(images["w"]), -1), axis=1)
    fitting = max(1, (width - _LABEL_WIDTH) // (6 + _GAP))
    shown = sorted(np.argsort(-norms, kind="stable")[: min(_CHANNELS, fitting)].tolist())
    each = min(_WIDEST, (width - _LABEL_WIDTH) // len(shown) - _GAP)
    grid = Table(box=None, pad_edge=False, padding=(0, _GAP, 1, 0), header_style="dim")
    grid.add_column("channel", width=_LABEL_WIDTH - _GAP, no_wrap=True)
    for channel in shown:
        grid.add_column(str(channel), no_wrap=True)
    for title, image in images.items():
        scale = _largest(image[shown])
        drawn = [Text("\n").join(picture(image[one], colour=colour, width=each, largest=scale)) for one in shown]
        grid.add_row(Text(f"{title}\n±{cell(scale)}"), *drawn)
    if len(shown) == len(norms):
        return grid
    return Group(grid, Text(f"{len(shown)} of {len(norms)} channels: those of the largest weights", style="dim"))


def _largest(values: np.ndarray) -> float:
    return float(np.abs(values[np.isfinite(values)]).max(initial=0.0))


def _terms(site: Mapping[str, Any], vectors: Vectors, width: int) -> RenderableType:
    """The inputs of the largest weights, by name; each number with a bar where there is room."""
    weights = np.nan_to_num(np.abs(vectors["w"]))
    shown = np.argsort(-weights, kind="stable")[:_TERMS]
    names = [input_name(site, int(index)) for index in shown]
    numbers = {title: column_cells(values[shown].tolist()) for title, values in vectors.items()}
    taken = max(map(len, names)) + sum(max(len(title), *map(len, texts)) for title, texts in numbers.items())
    half = min(_LONGEST_BAR, ((width - taken) // len(vectors) - 2 * _GAP - 1) // 2)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, _GAP - 1, 0, 0))
    table.add_column("input", no_wrap=True)
    columns: list[list[str]] = []
    for title, values in vectors.items():
        table.add_column(Text(title), justify="right", no_wrap=True)
        columns.append(numbers[title])
        if half > 1:
            table.add_column("", no_wrap=True)
            columns.append([_bar(value / (_largest(values) or 1.0), half) for value in values[shown]])
    for index, name in enumerate(names):
        table.add_row(Text(name), *(column[index] for column in columns))
    if len(weights) <= _TERMS:
        return table
    share = float(np.sum(weights[shown] ** 2) / max(float(np.sum(weights**2)), 1e-300))
    note = f"{_TERMS} of {len(weights)} inputs: those of the largest weights, {100 * share:.0f} % of ‖w‖²"
    return Group(table, Text(note, style="dim"))


def _bar(share: float, half: int) -> str:
    """A bar to the left for negative, to the right for positive values."""
    length = round(abs(share) * half) if np.isfinite(share) else 0
    left, right = ("=" * length, "") if share < 0 else ("", "=" * length)
    return f"{left:>{half}}|{right:<{half}}"
