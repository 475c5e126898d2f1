"""Rows of a query as a table that fits a terminal: numbers shortened and aligned, names broken at underscores.

Layer 5: pure. What does not fit is first shortened, then turned on its side or left
out, and a caption says so: nothing is dropped in silence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pipeline.counted import counted

NULL = "–"
# text is shortened to this, and no more, before a column is left out
_SHORTEST = 14
# headings break behind underscores into lines of about this, and of the second where that does not fit
_HEADINGS = (12, 6)
# at most so many rows are turned on their side where they do not fit
_RECORDS = 3
_GAP = 2


def cell(value: Any) -> str:
    """Write one value for reading: four significant digits, "–" for null, long lists by their ends.

    >>> cell(0.123456), cell(None), cell(float("nan")), cell(12000000), cell([1.0, 2.0, 3.0, 4.0, 5.0])
    ('0.1235', '–', 'NaN', '12000000', '[1, 2, 3, … 5 values]')
    """
    if value is None:
        return NULL
    if isinstance(value, float):
        return "NaN" if math.isnan(value) else f"{value:.4g}"
    if isinstance(value, list):
        shown = ", ".join(map(cell, value[:3]))
        return f"[{shown}, … {len(value)} values]" if len(value) > 4 else f"[{', '.join(map(cell, value))}]"
    return str(value)


def column_cells(values: Sequence[Any]) -> list[str]:
    """Write the values of one column: floats with as many decimals as show four digits of the largest.

    Those of which these would show fewer than two digits are written with two.

    >>> column_cells([0.5, -0.12345, None]), column_cells([12.5, 0.25]), column_cells([1e-9, 1.0])
    (['0.5000', '-0.1235', '–'], ['12.50', '0.25'], ['1e-09', '1'])
    >>> column_cells([0.5, 0.00075123, -0.00004, 0.0]), column_cells([12.5, 0.004])
    (['0.5000', '0.00075', '-4.0e-05', '0.0000'], ['12.50', '0.0040'])
    """
    sizes = [abs(value) for value in values if isinstance(value, float) and math.isfinite(value) and value != 0]
    if not sizes:
        return [cell(value) for value in values]
    decimals = 3 - max(-1, math.floor(math.log10(max(sizes))))
    if decimals < 0 or min(sizes) < 10 ** -(decimals + 1):
        return [cell(value) for value in values]
    return [_fixed(value, decimals) for value in values]


def _fixed(value: Any, decimals: int) -> str:
    if not isinstance(value, float) or not math.isfinite(value):
        return cell(value)
    is_small = 0 < abs(value) < 10 ** (1 - decimals)
    # −0 is 0
    return f"{value:#.2g}" if is_small else f"{value + 0.0:.{decimals}f}"


def fitted(columns: Sequence[str], rows: Sequence[Sequence[Any]], *, width: int) -> RenderableType:
    """Lay rows out as a table of at most `width` characters."""
    values = [[row[index] for row in rows] for index in range(len(columns))]
    written = [column_cells(column) for column in values]
    cells = [[column[index] for column in written] for index in range(len(rows))]
    numeric = [_is_numeric(column) for column in values]
    for limit in _HEADINGS:
        headings = [_heading(name, limit, column) for name, column in zip(columns, written, strict=True)]
        if _width(headings, cells) <= width:
            return _table(headings, cells, numeric)
    cells = _shortened(headings, cells, numeric, width)
    if _width(headings, cells) <= width:
        return _table(headings, cells, numeric)
    if len(rows) <= _RECORDS:
        return _records(columns, [[cell(value) for value in row] for row in rows])
    kept = len(columns)
    while kept > 1 and _width(headings[:kept], [row[:kept] for row in cells]) > width:
        kept -= 1
    table = _table(headings[:kept], [row[:kept] for row in cells], numeric)
    return Group(table, _left_out(columns[kept:], width))


def _is_numeric(values: Sequence[Any]) -> bool:
    kinds = {type(value) for value in values if value is not None}
    return bool(kinds) and all(issubclass(kind, int | float) and kind is not bool for kind in kinds)


def _shortened(headings: Sequence[str], cells: list[list[str]], numeric: Sequence[bool], width: int) -> list[list[str]]:
    """Cut the longest texts until the table fits, none below _SHORTEST."""
    longest = max((len(text) for row in cells for text in row), default=0)
    while _width(headings, cells) > width and longest > _SHORTEST:
        longest = max(_SHORTEST, longest - max(1, longest // 16))
        cells = [
            [text if number else _cut(text, longest) for text, number in zip(row, numeric, strict=True)]
            for row in cells
        ]
    return cells


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1].rstrip('…')}…"


def _heading(name: str, limit: int, texts: Sequence[str]) -> str:
    """Break a name behind underscores into lines of about `limit`, or the width of what stands below it."""
    limit = max(limit, *map(len, texts), 0)
    lines = [""]
    for part in name.replace("_", "_\n").split("\n"):
        if lines[-1] and len(lines[-1]) + len(part) > limit:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def _width(headings: Sequence[str], cells: Sequence[Sequence[str]]) -> int:
    widths = [
        max(len(line) for text in (heading, *(row[index] for row in cells)) for line in text.split("\n"))
        for index, heading in enumerate(headings)
    ]
    return sum(widths) + _GAP * max(0, len(widths) - 1)


def _table(headings: Sequence[str], cells: Sequence[Sequence[str]], numeric: Sequence[bool]) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold", padding=(0, _GAP - 1, 0, 0)
    )
    for heading, is_number in zip(headings, numeric, strict=False):
        table.add_column(Text(heading), justify="right" if is_number else "left", no_wrap=True, vertical="bottom")
    for row in cells:
        table.add_row(*map(Text, row))
    return table


def _records(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> RenderableType:
    parts: list[RenderableType] = []
    for number, row in enumerate(rows):
        table = Table(box=None, show_header=False, pad_edge=False)
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for name, text in zip(columns, row, strict=True):
            table.add_row(Text(name), Text(text))
        parts += [Text(f"row {number + 1}", style="dim"), table] if len(rows) > 1 else [table]
    return Group(*parts)


def _left_out(names: Sequence[str], width: int) -> Text:
    listed = ", ".join(names)
    shown = listed if len(listed) < 2 * width else f"{listed[: 2 * width].rsplit(', ', 1)[0]}, …"
    left = counted(len(names), "more column")
    return Text(f"{left} than fit; select them, or use --format csv: {shown}", style="dim")


def size(count: int) -> str:
    """Write a number of bytes.

    >>> size(512), size(84_842), size(3 * 2**30)
    ('512 B', '82.9 KiB', '3.0 GiB')
    """
    amount, unit = float(count), 0
    while amount >= 1024 and unit < 4:
        amount, unit = amount / 1024, unit + 1
    return f"{count} B" if unit == 0 else f"{amount:.1f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[unit]}"


def lasting(seconds: float) -> str:
    """Write a stretch of time.

    >>> lasting(0.034), lasting(12.34), lasting(3720), lasting(9 * 86400)
    ('34 ms', '12 s', '62 min', '9.0 days')
    """
    for limit, unit, name, digits in (
        (1, 1e-3, "ms", 0),
        (120, 1, "s", 0),
        (7200, 60, "min", 0),
        (172800, 3600, "h", 1),
    ):
        if seconds < limit:
            return f"{seconds / unit:.{digits}f} {name}"
    return f"{seconds / 86400:.1f} days"
