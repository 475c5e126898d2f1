"""Rows of a query for other programs: CSV, JSON and Parquet.

Layer 5. Null, NaN and 0 stay three things: CSV writes nothing, `nan` and `0`; JSON, which knows no NaN, writes `null`,
`"NaN"` (as Protocol Buffers' JSON does) and `0`; Parquet holds all three. A DECIMAL is a number in JSON,
or a string where it has more digits than readers of JSON keep. Rows are written as they come.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import IO, Any

from pipeline.errors import StoreError

Rows = Iterable[Sequence[Any]]


def write_csv(columns: Sequence[str], rows: Rows, sink: IO[bytes]) -> None:
    """Write CSV with a header; lists are JSON in one field."""
    text = io.TextIOWrapper(sink, encoding="utf-8", newline="", write_through=True)
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow([_json(value) if isinstance(value, list | dict) else value for value in row])
    text.detach()


def write_json(columns: Sequence[str], rows: Rows, sink: IO[bytes]) -> None:
    """Write one array of objects, an object a line."""
    separator = "[\n"
    for row in rows:
        sink.write(f"{separator}{_json(dict(zip(columns, row, strict=True)))}".encode())
        separator = ",\n"
    sink.write(b"[]\n" if separator == "[\n" else b"\n]\n")


def write_parquet(batches: Any, sink: IO[bytes]) -> None:
    """Write what a pyarrow.RecordBatchReader gives as one Parquet file."""
    import pyarrow.parquet as pq  # 0.4 s, and only Parquet needs it

    with pq.ParquetWriter(sink, batches.schema, compression="zstd") as writer:
        for batch in batches:
            writer.write_batch(batch)


def _json(value: Any) -> str:
    return json.dumps(_plain(value), ensure_ascii=False, default=str)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Decimal):
        # what is written is the shortest that double precision tells apart
        return float(value) if Decimal(repr(float(value))) == value else value
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, dict):
        return {str(name): _plain(one) for name, one in value.items()}
    return value


WRITERS: dict[str, Callable[[Sequence[str], Rows, IO[bytes]], None]] = {"csv": write_csv, "json": write_json}


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A file that appears under its name only when all of it is written. StoreError if it cannot be."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(draft, "wb") as sink:
            yield sink
        os.replace(draft, path)
    except OSError as error:
        raise StoreError(f"{path}: cannot be written: {error.strerror}") from error
    finally:
        draft.unlink(missing_ok=True)
