"""One row as the models of a run were given it, read once more from the data set that the run's job names.

Layer 5: asks a run's manifest for the job, its tables for the chunks; writes nothing. How it looks is `report/row.py`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.batch import Batch
from pipeline.errors import DataError
from pipeline.job import read_spec
from pipeline.job_sections import DataSpec
from pipeline.manifest import read_manifest
from pipeline.names import Names
from pipeline.query import Connection, ask
from pipeline.registry import sources
from pipeline.rows.decode import UID_MASK
from pipeline.sources.base import Chunk, Source
from pipeline.store import Store
from pipeline.withheld import Withheld

# rows that are read at a time
BATCH_ROWS = 64
# what must be in reach to find one
TABLES = ("receipts",)


@dataclass(frozen=True)
class Shown:
    """A row: its batch and its place in it, where it stands in the data, and what the data calls things.

    is_whole  the batch is a graph, and the row one of its nodes
    """

    uid: int
    data: str
    split: str
    where: str
    batch: Batch
    place: int
    names: Names
    labels: Sequence[str]
    is_whole: bool


def find_row(con: Connection, store: Store, measured: Mapping[str, Any], uid: int, *, job: str | None = None) -> Shown:
    """The row of a uid in the data, split and run of a row of `neurons`. DataError if it is there no longer.

    Names of files that are relative begin where the `job` file is, or in the working directory.
    """
    run, data, split = (str(measured[name]) for name in ("run", "data", "split"))
    spec = read_spec(read_manifest(store, run).job["data"][data], directory=str(Path(job).parent) if job else ".")
    source: Source = sources()[spec.source](data, spec, Withheld(store))
    try:
        shown = row_in(source, _measured(con, source, measured), uid)
    except DataError as error:
        hint = "" if job or _is_absolute(spec) else "; its name begins where the job file is: say so by --job JOB.toml"
        raise DataError(f"{error}{hint}") from error
    if shown is None:
        raise DataError(f"{data}/{split} has no row with uid {uid}: expected one as in the table exemplars")
    return shown


def labels_of(store: Store, measured: Mapping[str, Any]) -> Sequence[str]:
    """What the data of a row of `neurons` calls its classes, by their numbers; nothing where they are numbers there."""
    return read_manifest(store, str(measured["run"])).job["data"][str(measured["data"])].get("labels") or ()


def row_in(source: Source, chunks: Sequence[Chunk], uid: int) -> Shown | None:
    """The row of a uid in some chunks of a source; None if none of them has it."""
    for chunk in _candidates(chunks, uid):
        for batch in source.read(chunk, BATCH_ROWS):
            if len(found := (batch.uid_N == uid).nonzero()):
                return Shown(
                    uid=uid,
                    data=source.data,
                    split=chunk.split,
                    where=source.where(chunk, uid),
                    batch=batch,
                    place=int(found[0]),
                    names=source.names,
                    labels=source.spec.labels or (),
                    is_whole=source.whole,
                )
    return None


def _measured(con: Connection, source: Source, measured: Mapping[str, Any]) -> list[Chunk]:
    """The chunks that were measured. DataError where the data has others now."""
    keys = {name: measured[name] for name in ("run", "data", "split", "model")}
    sql = f"SELECT DISTINCT chunk FROM receipts WHERE {' AND '.join(f'{name} = ${name}' for name in keys)}"
    wanted = {row[0] for row in ask(con, sql, keys).rows}
    there = [chunk for chunk in source.chunks(str(measured["split"])) if chunk.id in wanted]
    if not there:
        raise DataError(f"data {source.data}: the files are others than those that run {measured['run']} has measured")
    return there


def _candidates(chunks: Sequence[Chunk], uid: int) -> Iterator[Chunk]:
    """Those that can hold the row: where rows are named by their number in a file, one."""
    for chunk in chunks:
        if chunk.uid_base is None or 0 <= ((uid - chunk.uid_base) & UID_MASK) - chunk.first_row < chunk.rows:
            yield chunk


def _is_absolute(spec: DataSpec) -> bool:
    return spec.url is None or "://" in spec.url or Path(os.path.expanduser(spec.url)).is_absolute()
