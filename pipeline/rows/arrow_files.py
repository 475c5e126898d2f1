"""Arrow IPC files (Feather version 2): what is known of one once it has been read, and its record batches.

Layer 1. Their footer says neither how many rows a batch has nor anything of what they are, and nothing in between need
differ where a number does: a file is identified by all of its bytes, read once per process. Large data on a bucket is
better kept as Parquet.
"""

from __future__ import annotations

import hashlib
from typing import IO, Any, NamedTuple

import pyarrow as pa

from pipeline.errors import DataError
from pipeline.hashing import digest
from pipeline.inputs import InputFile

MAGIC = b"ARROW1"
# how a stream begins, which is no file: its batches can only be found one after the other
_STREAM = b"\xff\xff\xff\xff"
_READ_BYTES = 1 << 20


class Known(NamedTuple):
    """What a file is: the digest of its content, its schema and the rows of each record batch."""

    file_id: str
    schema: pa.Schema
    batch_rows: tuple[int, ...]


# by URL, size and ETag: every chunk asks whether the file is still the one that was planned
_known: dict[InputFile, Known] = {}


def is_stream(head: bytes) -> bool:
    """Whether a file begins as an Arrow stream does, which has no footer."""
    return head[:4] == _STREAM


def known_of(file: InputFile, stream: IO[bytes]) -> Known:
    """What a file is. DataError if it is damaged; a batch may still be found to be so when it is read."""
    if file not in _known:
        _known[file] = _examined(file, stream)
    return _known[file]


def _examined(file: InputFile, stream: IO[bytes]) -> Known:
    content = hashlib.sha256()
    stream.seek(0)
    while part := stream.read(_READ_BYTES):
        content.update(part)
    try:
        schema = pa.ipc.open_file(_whole(stream)).schema
        # the column that is read soonest: rows are counted by it
        cheap = min(range(len(schema)), key=lambda at: _width(schema.field(at).type), default=None)
        reader = open_batches(stream, [] if cheap is None else [cheap])
        rows = tuple(reader.get_batch(number).num_rows for number in range(reader.num_record_batches))
    except (pa.ArrowException, OSError, EOFError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise DataError(f"{file.url}: the Arrow file is damaged: {' '.join(str(error).split())}") from error
    return Known(digest([file.size, content.hexdigest()]), schema, rows)


def open_batches(source: Any, columns: list[int]) -> pa.ipc.RecordBatchFileReader:
    """A reader of some columns by their number; of all if none is given."""
    options = pa.ipc.IpcReadOptions(included_fields=columns, use_threads=False)
    return pa.ipc.open_file(_whole(source), options=options)


def read_batch(reader: pa.ipc.RecordBatchFileReader, number: int) -> pa.Table:
    """A record batch as a table; ArrowInvalid where it is corrupt: nothing else guards against offsets out of range."""
    batch = reader.get_batch(number)
    batch.validate(full=True)
    return pa.Table.from_batches([batch])


def _whole(source: Any) -> Any:
    source.seek(0)
    return source


def _width(kind: pa.DataType) -> int:
    try:
        return int(kind.bit_width)
    except ValueError:
        return 1 << 20
