"""Row groups of one file, read whole: from the very file that was planned, a corrupt one told from a bad line.

Layer 1.
"""

from __future__ import annotations

import io
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import DataError
from pipeline.inputs import WatchedInput, input_errors, input_file, open_input
from pipeline.rows import arrow_files
from pipeline.rows.features import PART_ROWS
from pipeline.rows.footers import Footer, read_footer

# row groups that are read at the same time
AT_ONCE = 2


@dataclass(frozen=True, eq=False)
class Group:
    """One row group: its rows in parts, or why none of them can be read."""

    rows: int
    parts: Sequence[pa.RecordBatch]
    damage: str = ""


def read_groups(url: str, file_id: str, groups: Sequence[int], columns: Sequence[str]) -> Iterator[Group]:
    """Read row groups in order. DataError if the file is not the one of `file_id`, before or after reading."""
    return (group.result() for group in begin_groups(url, file_id, groups, columns))


def begin_groups(
    url: str,
    file_id: str,
    groups: Sequence[int],
    columns: Sequence[str],
    *,
    encoded: Sequence[str] = (),
    part_rows: int = PART_ROWS,
) -> Iterator[Future[Group]]:
    """The same, each row group handed out while another thread reads it, and the next one; no more than two at once.

    Text in columns of `encoded` stays as the file has it: numbers of the values of a dictionary. A group comes in parts
    of up to `part_rows` rows.
    """
    file = input_file(url)
    footer = read_footer(url, file)
    if footer.file_id != file_id:
        raise DataError(f"{url}: the file has changed since the run was planned; run again")
    begun: deque[Future[Group]] = deque(maxlen=AT_ONCE)
    with open_input(url) as stream:
        watched = WatchedInput(stream)
        # Arrow reads a local file without Python, which else waits for what the other threads do with rows
        source = pa.OSFile(stream.name) if isinstance(stream, io.BufferedReader) else watched
        reader = _arrow if footer.metadata is None else _parquet
        # each reads one group at a time
        readers = [reader(footer, source, columns, encoded) for _ in groups[:AT_ONCE]]
        try:
            for number, group in enumerate(groups):
                if number >= AT_ONCE:
                    wait([begun[0]])
                rows = footer.group_rows[group]
                read = partial(_read, readers[number % AT_ONCE], watched, group, rows, url, part_rows)
                begun.append(_threads(os.getpid()).submit(read))
                # the last one is read meanwhile: to wake a thread takes as long as to read a part
                if number:
                    yield begun[0]
            if begun:
                yield begun[-1]
        finally:
            wait(begun)
    if input_file(url).etag != file.etag:
        raise DataError(f"{url}: the file was replaced while it was read; run again")


@cache
def _threads(process: int) -> ThreadPoolExecutor:
    """Kept for every file: a thread that is new has neither memory nor caches of its own. A fork has none of them."""
    return ThreadPoolExecutor(AT_ONCE, thread_name_prefix="row-groups")


# reads a row group by its number
_Reader = Callable[[int], pa.Table]


def _parquet(footer: Footer, source: Any, columns: Sequence[str], encoded: Sequence[str]) -> _Reader:
    parquet = pq.ParquetFile(
        source,
        metadata=footer.metadata,
        pre_buffer=True,
        page_checksum_verification=True,
        read_dictionary=list(encoded),
    )
    # one thread of Arrow's: a worker has the cores that its job gave it, and the next group is read by another of ours
    return lambda group: parquet.read_row_group(group, columns=list(columns), use_threads=False)


def _arrow(footer: Footer, source: Any, columns: Sequence[str], _: Sequence[str]) -> _Reader:
    batches = arrow_files.open_batches(source, sorted({footer.schema.get_field_index(name) for name in columns}))
    return lambda group: arrow_files.read_batch(batches, group).select(list(columns))


def _read(reader: _Reader, watched: WatchedInput, group: int, rows: int, url: str, part_rows: int) -> Group:
    try:
        table = reader(group)
    except Exception as error:  # what storage drivers raise shares no base class
        # what the system or a server says has a number or is seen by `watched`; what Arrow finds wrong has neither
        failure = error if isinstance(error, OSError) and error.errno else watched.failure
        if failure is not None:
            with input_errors(url):
                raise failure from None
        if not isinstance(error, pa.ArrowException | OSError | EOFError):
            raise
        return Group(rows, (), f"row group {group} is corrupt: {' '.join(str(error).split())}")
    return Group(rows, _takeable(table).to_batches(max_chunksize=part_rows))


def _takeable(table: pa.Table) -> pa.Table:
    """The same rows in types that Arrow can filter: it cannot take some of a column of views."""
    for place, field in enumerate(table.schema):
        if pa.types.is_string_view(field.type):
            column = table.column(place).cast(pa.large_string())
            table = table.set_column(place, field.with_type(pa.large_string()), column)
    return table
