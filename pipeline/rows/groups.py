"""Row groups of one file, read whole: from the very file that was planned, a corrupt one told from a bad line.

Layer 1.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import DataError, is_machines_fault
from pipeline.inputs import WatchedInput, input_errors, input_file, open_input
from pipeline.rows import arrow_files
from pipeline.rows.features import PART_ROWS
from pipeline.rows.footers import Footer, read_footer

# row groups that are read before one is used: while one is decoded, and while the thread that does is late
AHEAD = 2


@dataclass(frozen=True, eq=False)
class Group:
    """One row group: its rows in parts, or why none of them can be read."""

    rows: int
    parts: Sequence[pa.RecordBatch]
    damage: str = ""


def read_groups(
    url: str,
    file_id: str,
    groups: Sequence[int],
    columns: Sequence[str],
    *,
    encoded: Sequence[str] = (),
    part_rows: int = PART_ROWS,
) -> Iterator[Group]:
    """Read row groups in order. DataError if the file is not the one of `file_id`, before or after reading.

    Text in columns of `encoded` stays as the file has it: numbers of the values of a dictionary. A group comes in parts
    of up to `part_rows` rows.
    """
    file = input_file(url)
    footer = read_footer(url, file)
    if footer.file_id != file_id:
        raise DataError(f"{url}: the file has changed since the run was planned; run again")
    with _opened(footer, tuple(columns), tuple(encoded)) as opened:
        for group in groups:
            yield _read(opened, group, footer.group_rows[group], url, part_rows)
    if input_file(url).etag != file.etag:
        raise DataError(f"{url}: the file was replaced while it was read; run again")


# reads a row group by its number
_Reader = Callable[[int], pa.Table]


class _Opened(NamedTuple):
    """Some columns of a file that is open, and what Arrow reads it through: None where that needs no Python."""

    reader: _Reader
    watched: WatchedInput | None


class _Last(threading.local):
    """The local file that a thread has read a chunk of, open for its next chunk, and closed with the thread."""

    def __init__(self) -> None:
        self.opened: dict[Any, _Opened] = {}


_last = _Last()


@contextmanager
def _opened(footer: Footer, columns: tuple[str, ...], encoded: tuple[str, ...]) -> Iterator[_Opened]:
    what = footer.file, footer.file_id, columns, encoded
    # taken away: a reader reads one group at a time
    known, _last.opened = _last.opened, {}
    if what in known:
        yield known[what]
        _last.opened = known
        return
    with open_input(footer.file.url) as stream:
        watched = None if isinstance(stream, io.BufferedReader) else WatchedInput(stream)
        # Arrow reads a local file without Python, which else waits for what the other thread does with rows
        source = watched or pa.OSFile(stream.name)
        opened = _Opened((_arrow if footer.metadata is None else _parquet)(footer, source, columns, encoded), watched)
        yield opened
    if watched is None:
        _last.opened = {what: opened}


def _parquet(footer: Footer, source: Any, columns: Sequence[str], encoded: Sequence[str]) -> _Reader:
    parquet = pq.ParquetFile(
        source,
        metadata=footer.metadata,
        # ranges of a bucket are asked for together
        pre_buffer=not isinstance(source, pa.OSFile),
        page_checksum_verification=True,
        read_dictionary=list(encoded),
    )
    # one thread: a worker has the cores that its job gave it, and the next group is read beside the model's work
    return lambda group: parquet.read_row_group(group, columns=list(columns), use_threads=False)


def _arrow(footer: Footer, source: Any, columns: Sequence[str], _: Sequence[str]) -> _Reader:
    batches = arrow_files.open_batches(source, sorted({footer.schema.get_field_index(name) for name in columns}))
    return lambda group: arrow_files.read_batch(batches, group).select(list(columns))


def _read(opened: _Opened, group: int, rows: int, url: str, part_rows: int) -> Group:
    try:
        table = opened.reader(group)
    except Exception as error:  # what storage drivers raise shares no base class
        # what the system or a server says has a number or is seen by `watched`; what Arrow finds wrong has neither
        failure = error if isinstance(error, OSError) and error.errno else opened.watched and opened.watched.failure
        if failure:
            with input_errors(url):
                raise failure from None
        if is_machines_fault(error) or not isinstance(error, pa.ArrowException | OSError | EOFError):
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
