"""What must be known of all rows of a table before the first of them is written to a Parquet file.

Layer 1: pyarrow, no I/O. A table comes in pieces, of which one is held at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

# a column of numbers that differ is a sixth smaller, and written and read in a third of the time, without a dictionary
SAMPLE_ROWS = 8192


@dataclass(frozen=True, eq=False)
class Seen:
    """What is known of a table.

    sample    its first SAMPLE_ROWS rows
    with_nan  the paths of columns that hold NaN
    models    how many models its rows are of; 0 where it does not say
    starts    the first row of each run of rows of one model
    bytes     of its buffers, were it in one piece
    """

    sample: pa.Table
    with_nan: frozenset[str]
    models: int
    starts: list[int]
    rows: int
    bytes: int


def look_over(pieces: Iterable[pa.Table]) -> Seen:
    """Look at every piece of a table; there is one at least, each in one chunk."""
    first: list[pa.Table] = []
    with_nan: set[str] = set()
    models: set[str] = set()
    starts, last, rows = [0], None, 0
    sizes: dict[str, _Size] = {}
    for piece in pieces:
        if rows < SAMPLE_ROWS:
            first.append(piece.slice(0, SAMPLE_ROWS - rows))
        with_nan |= {path for path, values in leaves(piece) if path not in with_nan and _has_nan(values)}
        for name in piece.column_names:
            sizes.setdefault(name, _Size(piece.schema.field(name).type)).add(piece[name])
        if piece.num_rows and "model" in piece.column_names:
            ids = piece["model"].combine_chunks()
            starts += [rows + start for start in _changes(ids, last) if rows + start]
            last = ids[-1].as_py()
            models |= set(ids.unique().to_pylist())
        rows += piece.num_rows
    size = sum(one.bytes(of_one=len(models) == 1) for one in sizes.values())
    return Seen(pa.concat_tables(first).combine_chunks(), frozenset(with_nan), len(models), starts, rows, size)


def leaves(table: pa.Table) -> Iterator[tuple[str, Any]]:
    """The path and the values of every column as Parquet sees it: of lists, their elements."""
    for name in table.column_names:
        column = table[name]
        is_list = pa.types.is_list(column.type)
        yield f"{name}.list.element" if is_list else name, pc.list_flatten(column) if is_list else column


def _has_nan(values: Any) -> bool:
    return pa.types.is_floating(values.type) and bool(pc.any(pc.is_nan(values)).as_py())


def _changes(ids: pa.Array, last: str | None) -> list[int]:
    """Where another model begins than stands before."""
    changes = pc.not_equal(ids.slice(1), ids.slice(0, len(ids) - 1)).to_numpy(zero_copy_only=False)
    return [*([] if ids[0].as_py() == last else [0]), *(np.flatnonzero(changes) + 1).tolist()]


@dataclass
class _Size:
    """What the buffers of a column would take, were it in one piece."""

    kind: pa.DataType
    values: int = 0
    nulls: int = 0
    data: int = 0
    elements: _Size | None = field(default=None)

    def add(self, column: pa.ChunkedArray) -> None:
        """Count the values of a piece."""
        self.values += len(column)
        self.nulls += column.null_count
        if pa.types.is_list(self.kind):
            self.elements = self.elements or _Size(self.kind.value_type)
            self.elements.add(pc.list_flatten(column))
        elif pa.types.is_string(self.kind):
            self.data += pc.sum(pc.binary_length(column)).as_py() or 0

    def bytes(self, *, of_one: bool) -> int:
        """Of rows of one model, which were read in one piece once, texts have a bitmap though none of them is null."""
        is_text = pa.types.is_string(self.kind)
        bitmap = (self.values + 7) // 8 if self.nulls or (of_one and is_text) else 0
        if self.elements is not None:
            return bitmap + 4 * self.values + self.elements.bytes(of_one=False)
        if is_text:
            return bitmap + 4 * self.values + self.data
        return bitmap + (self.values * self.kind.bit_width + 7) // 8
