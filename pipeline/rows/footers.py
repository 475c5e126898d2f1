"""What is known of a file of rows before they are read: its identity, its schema and its row groups.

Layer 1. Of Parquet without reading a row; an Arrow IPC file's record batches are its row groups, see `arrow_files`. A
file is identified by its content and not by its name, so that it can be moved: size, footer, and the first
and last 64 KiB. The footer alone would not do: uncompressed files of equal length with the same extremes share it.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from functools import lru_cache
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import DataError
from pipeline.hashing import digest, sha256, splitmix64
from pipeline.inputs import InputFile, input_errors, open_input
from pipeline.rows import arrow_files

EDGE_BYTES = 64 << 10
# a file that was written later than that ago may be written again within a tick of the clock that dates it
SETTLED_S = 2.0
_MAGIC = b"PAR1"


@dataclass(frozen=True, eq=False)
class Footer:
    """The footer of one file.

    name        how the job names the file, `file` where it is
    group_rows  rows of each row group
    metadata    what Parquet says of them; None of an Arrow file, which says nothing
    """

    name: str
    file: InputFile
    file_id: str
    schema: pa.Schema
    group_rows: tuple[int, ...]
    metadata: pq.FileMetaData | None = None

    @property
    def uid_base(self) -> int:
        """The uid of the file's first row where no column names the rows."""
        return first_uid(self.file_id)

    def names_of(self, column: str) -> tuple[str, ...]:
        """What the numbers in lists of a column are called, where the file says so: a JSON array of strings under
        "names" in the metadata of the column's Arrow field. DataError if it is none.
        """
        metadata = self.schema.field(column).metadata or {} if self.schema.names.count(column) == 1 else {}
        try:
            found = json.loads(metadata.get(b"names", b"[]"))
        except ValueError:
            found = None
        if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
            raise DataError(f"{self.file.url}: column {column!r} has `names` that are no JSON array of strings")
        return tuple(found)

    @property
    def groups(self) -> range:
        """The numbers of its row groups."""
        return range(len(self.group_rows))

    @property
    def rows(self) -> int:
        """Rows of all of them."""
        return sum(self.group_rows)

    def bounds(self, group: int, column: str) -> tuple[Any, Any] | None:
        """Least and greatest value of a flat column in a row group; None where the footer does not say, or no text."""
        for index in range(self.metadata.num_columns) if self.metadata is not None else ():
            chunk = self.metadata.row_group(group).column(index)  # type: ignore[union-attr]
            if chunk.path_in_schema == column:
                statistics = chunk.statistics
                known = statistics is not None and statistics.has_min_max
                try:
                    return (statistics.min, statistics.max) if known else None
                except UnicodeDecodeError:
                    return None
        return None


def first_uid(file_id: str) -> int:
    """63 bits of a file's identity, from which its rows are numbered."""
    return splitmix64(int(file_id[:16], 16))


def read_footer(name: str, file: InputFile) -> Footer:
    """Read head and tail of a file in two range requests, all of an Arrow file; DataError if it is neither.

    Every chunk asks for it: the last few are remembered of files that have settled.
    """
    settled = file.modified_s is None or time.time() - file.modified_s > SETTLED_S
    return _remembered(name, file) if settled else _read(name, file)


@lru_cache(maxsize=4)
def _remembered(name: str, file: InputFile) -> Footer:
    return _read(name, file)


def _read(name: str, file: InputFile) -> Footer:
    with input_errors(file.url), open_input(file.url) as stream:
        return parse_footer(name, file, stream)


def parse_footer(name: str, file: InputFile, stream: IO[bytes]) -> Footer:
    """The footer of a file that is open."""
    head = stream.read(EDGE_BYTES)
    if head.startswith(arrow_files.MAGIC):
        known = arrow_files.known_of(file, stream)
        return Footer(name, file, known.file_id, known.schema, known.batch_rows)
    if arrow_files.is_stream(head):
        raise DataError(f"{file.url}: an Arrow stream, which has no footer; expected an Arrow file or Parquet")
    stream.seek(max(0, file.size - EDGE_BYTES))
    tail = stream.read(EDGE_BYTES)
    footer_bytes = 8 + int.from_bytes(tail[-8:-4], "little")
    if EDGE_BYTES < footer_bytes <= file.size:
        stream.seek(file.size - footer_bytes)
        tail = stream.read(footer_bytes)
    if head[:4] != _MAGIC or tail[-4:] != _MAGIC:
        raise DataError(
            f"{file.url}: not a Parquet file, or a truncated one: it does not begin and end with PAR1 (nor is it an "
            "Arrow file)"
        )
    try:
        opened = pq.ParquetFile(pa.BufferReader(tail))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file.url}: the footer is damaged: {error}") from error
    file_id = digest([file.size, sha256(head), sha256(tail)])
    metadata = opened.metadata
    rows = tuple(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
    return Footer(name, file, file_id, opened.schema_arrow, rows, metadata)
