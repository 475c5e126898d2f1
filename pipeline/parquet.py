"""The bytes of a table: one Parquet file whose footer tells a reader what it need not read.

Layer 1: pyarrow, no I/O. The same table gives the same bytes. Row groups hold whole models where those are small, and a
Bloom filter of their ids: ids are digests, so the least and the greatest of ten say nothing about the others.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from itertools import islice, pairwise
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.looked_over import SAMPLE_ROWS, Seen, leaves, look_over

# a point lookup reads one group: 12 ms at 65,536 rows, 142 ms at 500,000
GROUP_ROWS = 65_536
# wide rows (patterns of thousands of numbers) in groups that fit a reader's memory
GROUP_BYTES = 64 << 20
# of a table that is worked on at once
PIECE_BYTES = 64 << 20
# of a hundred questions about a model, one touches a part of a store of ten that has none of its rows
FALSE_POSITIVES = 0.001


def parquet_bytes(table: pa.Table) -> bytes:
    """The table as one Parquet file: zstd, small row groups."""
    return parquet_of(lambda: iter([table]))


def parquet_of(parts: Callable[[], Iterator[pa.Table]]) -> bytes:
    """The Parquet file of a table that comes in parts, which are held a few at a time and, of a large one, made twice.

    The same rows are the same bytes, however they are parted.
    """
    begin = list(islice(_pieces(parts()), 2))
    is_small = len(begin) == 1
    seen = look_over(begin if is_small else _pieces(parts()))
    sink = io.BytesIO()
    with pq.ParquetWriter(
        sink,
        seen.sample.schema,
        compression="zstd",
        compression_level=3,
        use_dictionary=[path for path, values in leaves(seen.sample) if _repeats(values)],
        # least and greatest leave NaN out, and readers that skip by them lose it or count it as small (DuckDB 2.0)
        write_statistics=[path for path, _ in leaves(seen.sample) if path not in seen.with_nan],
        write_page_index=True,
        bloom_filter_options=_filters(seen),
    ) as writer:
        for rows in _cut(begin if is_small else _pieces(parts()), _groups(seen)):
            writer.write_table(rows, row_group_size=max(1, rows.num_rows))
    return sink.getvalue()


def read_parquet(content: bytes) -> pa.Table:
    """The table of one Parquet file."""
    # read ahead by pyarrow's own threads can abort a process that ends soon after (2 in 100 under load)
    return pq.ParquetFile(io.BytesIO(content), pre_buffer=False).read(use_threads=False)


def _pieces(parts: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The parts put together to pieces that are worth a look each."""
    pending: list[pa.Table] = []
    held = 0
    for table in parts:
        pending.append(table)
        held += table.nbytes
        if held > PIECE_BYTES:
            yield pa.concat_tables(pending).combine_chunks()
            pending, held = [], 0
    if pending:
        yield pa.concat_tables(pending).combine_chunks()


def _cut(pieces: Iterable[pa.Table], groups: Iterable[tuple[int, int]]) -> Iterator[pa.Table]:
    """The rows of each group, from pieces that are gone through once."""
    coming = iter(pieces)
    held, first = next(coming), 0
    for start, stop in groups:
        while first + held.num_rows < stop:
            rest = held.slice(start - first)
            held, first = pa.concat_tables([rest, next(coming)]).combine_chunks(), start
        yield held.slice(start - first, stop - start)


def _repeats(values: Any) -> bool:
    """Whether values come more than twice, as far as the first of them show."""
    return 2 * pc.count_distinct(values.slice(0, SAMPLE_ROWS)).as_py() < min(len(values), SAMPLE_ROWS)


def _filters(seen: Seen) -> dict[str, dict[str, float]]:
    return {"model": {"ndv": seen.models, "fpp": FALSE_POSITIVES}} if seen.models else {}


def _groups(seen: Seen) -> Iterator[tuple[int, int]]:
    """Where row groups begin and end: as many whole models as fit, and a model that does not, in several."""
    width = max(1, seen.bytes // max(1, seen.rows))
    limit = int(min(GROUP_ROWS, max(1, GROUP_BYTES // width)))
    start = 0
    for first, last in pairwise([*seen.starts, seen.rows]):
        if last - start > limit and first > start:
            yield start, first
            start = first
        while last - start > limit:
            yield start, start + limit
            start += limit
    if start < seen.rows or not seen.rows:
        yield start, seen.rows
