"""The pack task: rows of many models into one Parquet part, sorted by model, then site.

Layer 3. Parts are a function of the reduced rows' sizes alone, so any driver cuts them alike: thousands of small files
would make every query pay thousands of requests.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.arrow_bytes import read_batches
from pipeline.errors import StoreError
from pipeline.hashing import sha256
from pipeline.manifest import File
from pipeline.parquet import parquet_bytes, parquet_of, read_parquet
from pipeline.reduce import rows_key
from pipeline.store import Store

PART_BYTES = 96 * 2**20


@dataclass(frozen=True)
class PackTask:
    """One part of one table: the models whose rows it holds, in order."""

    run: str
    table: str
    number: int
    models: tuple[str, ...]

    units: ClassVar[int] = 1

    def parts(self) -> tuple[()]:
        """Nothing: the task cannot be cut."""
        return ()

    @property
    def key(self) -> str:
        """Where the part is stored."""
        return f"runs/{self.run}/tables/{self.table}/part-{self.number:05d}.parquet"


def pack_tasks(run: str, reduced: Mapping[str, Mapping[str, Mapping[str, int]]]) -> list[PackTask]:
    """Cut every table into parts of about PART_BYTES; `reduced` is model id → table → {rows, bytes}."""
    tables = sorted({table for files in reduced.values() for table in files})
    tasks = []
    for table in tables:
        sizes = [(model, reduced[model][table]["bytes"]) for model in sorted(reduced) if table in reduced[model]]
        tasks += [PackTask(run, table, number, part) for number, part in enumerate(_cut(sizes))]
    return tasks


def _cut(sizes: Sequence[tuple[str, int]]) -> list[tuple[str, ...]]:
    parts: list[list[str]] = [[]]
    filled = 0
    for model, size in sizes:
        if parts[-1] and filled + size > PART_BYTES:
            parts.append([])
            filled = 0
        parts[-1].append(model)
        filled += size
    return [tuple(part) for part in parts]


def run_pack(task: PackTask, store: Store) -> File:
    """Store one part, create-only, and say what it is for the manifest. StoreError if other rows are there."""
    compressed = [store.get(rows_key(task.run, model, task.table)) for model in task.models]
    content = made = parquet_of(lambda: _rows(task, compressed))
    stored = store.put_once(task.key, content)
    if stored != sha256(content):
        # another driver, with another version of the writer perhaps, was first: the manifest describes its bytes
        content = store.get(task.key)
        # by this writer the same rows are the same bytes
        if parquet_bytes(read_parquet(content)) != made:
            raise StoreError(
                f"{task.key} holds other rows than belong there, from another version of neuron-census or of models "
                f"that were made anew: remove what is below runs/{task.run}/tables/ and run again"
            )
    return File(
        table=task.table,
        key=task.key,
        sha256=stored,
        bytes=len(content),
        rows=pq.read_metadata(io.BytesIO(content)).num_rows,
        first_model=task.models[0],
        last_model=task.models[-1],
    )


def _rows(task: PackTask, compressed: Sequence[bytes]) -> Iterator[pa.Table]:
    """The rows of each model in turn, as they come; StoreError if some have other columns, or are another model's."""
    schema = None
    for model, content in zip(task.models, compressed, strict=True):
        key, anew = rows_key(task.run, model, task.table), f"remove what is below runs/{task.run}/reduced/"
        for table in _read(content, key, f"{anew}{model}/ and run again"):
            schema = schema or table.schema
            if table.schema != schema:
                raise StoreError(
                    f"{key} has other columns than that of {task.models[0]}, from another version of neuron-census: "
                    f"{anew} and run again"
                )
            if others := set(table["model"].unique().to_pylist()) - {model}:
                raise StoreError(f"{key} holds rows of model {min(others)}: {anew}{model}/ and run again")
            yield table


def _read(content: bytes, key: str, advice: str) -> Iterator[pa.Table]:
    try:
        yield from read_batches(content)
    except (pa.ArrowException, OSError) as error:
        raise StoreError(f"{key} is damaged ({error}): {advice}") from error
