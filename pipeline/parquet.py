"""The bytes of a table: one Parquet file whose footer tells a reader what it need not read.

Layer 1: pyarrow, no I/O. The same table gives the same bytes. Row groups hold whole models where those are small, and a
Bloom filter of their ids: ids are digests, so the least and the greatest of ten say nothing about the others.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

# a point lookup reads one group: 12 ms at 65,536 rows, 142 ms at 500,000
GROUP_ROWS = 65_536
# wide rows (patterns of thousands of numbers) in groups that fit a reader's memory
GROUP_BYTES = 64 << 20
# of a hundred questions about a model, one touches a part of a store of ten that has none of its rows
FALSE_POSITIVES = 0.001
# a column of numbers that differ is a sixth smaller, and written and read in a third of the time, without a dictionary
SAMPLE_ROWS = 8192


def parquet_bytes(table: pa.Table) -> bytes:
    """The table as one Parquet file: zstd, small row groups."""
    table = table.combine_chunks()
    sink = io.BytesIO()
    with pq.ParquetWriter(
        sink,
        table.schema,
        compression="zstd",
        compression_level=3,
        use_dictionary=[path for path, values in _leaves(table) if _repeats(values)],
        # least and greatest leave NaN out, and readers that skip by them lose it or count it as small (DuckDB 2.0)
        write_statistics=[path for path, values in _leaves(table, whole=True) if not _has_nan(values)],
        write_page_index=True,
        bloom_filter_options=_filters(table),
    ) as writer:
        for start, stop in _groups(table):
            writer.write_table(table.slice(start, stop - start), row_group_size=max(1, stop - start))
    return sink.getvalue()


def read_parquet(content: bytes) -> pa.Table:
    """The table of one Parquet file."""
    # read ahead by pyarrow's own threads can abort a process that ends soon after (2 in 100 under load)
    return pq.ParquetFile(io.BytesIO(content), pre_buffer=False).read(use_threads=False)


def _leaves(table: pa.Table, *, whole: bool = False) -> Iterator[tuple[str, Any]]:
    """The path and the values, the first or all, of every column as Parquet sees it: of lists, their elements."""
    for name in table.column_names:
        column = table[name] if whole else table[name].slice(0, SAMPLE_ROWS)
        is_list = pa.types.is_list(column.type)
        yield f"{name}.list.element" if is_list else name, pc.list_flatten(column) if is_list else column


def _repeats(values: Any) -> bool:
    """Whether values come more than twice, as far as the first of them show."""
    return 2 * pc.count_distinct(values.slice(0, SAMPLE_ROWS)).as_py() < min(len(values), SAMPLE_ROWS)


def _has_nan(values: Any) -> bool:
    return pa.types.is_floating(values.type) and bool(pc.any(pc.is_nan(values)).as_py())


def _filters(table: pa.Table) -> dict[str, dict[str, float]]:
    if not table.num_rows or "model" not in table.column_names:
        return {}
    return {"model": {"ndv": pc.count_distinct(table["model"]).as_py(), "fpp": FALSE_POSITIVES}}


def _groups(table: pa.Table) -> Iterator[tuple[int, int]]:
    """Where row groups begin and end: as many whole models as fit, and a model that does not, in several."""
    width = max(1, table.nbytes // max(1, table.num_rows))
    limit = int(min(GROUP_ROWS, max(1, GROUP_BYTES // width)))
    start = 0
    for first, last in pairwise(_bounds(table)):
        if last - start > limit and first > start:
            yield start, first
            start = first
        while last - start > limit:
            yield start, start + limit
            start += limit
    if start < table.num_rows or not table.num_rows:
        yield start, table.num_rows


def _bounds(table: pa.Table) -> list[int]:
    """The first row of each run of rows of one model, and the number of rows."""
    if not table.num_rows or "model" not in table.column_names:
        return [0, table.num_rows]
    ids = table["model"].combine_chunks()
    changes = pc.not_equal(ids.slice(1), ids.slice(0, len(ids) - 1))
    return [0, *(np.flatnonzero(changes.to_numpy(zero_copy_only=False)) + 1).tolist(), table.num_rows]
