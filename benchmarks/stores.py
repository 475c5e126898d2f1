"""Stores of many runs with made-up values, written by what writes a real run's tables: for benchmarks and tests.

Every column of `models`, `sites` and `neurons` is there and none is null, so a row is as wide as any real one can be;
values are drawn, which no encoding makes smaller than it makes measured ones. Tables go through the reduced rows of
each model, the pack task and the manifest, as in `pipeline/run.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.arrow_bytes import arrow_bytes
from pipeline.columns import Column
from pipeline.hashing import digest
from pipeline.manifest import Coverage, Manifest, encode, manifest_key, versions
from pipeline.pack import pack_tasks, run_pack
from pipeline.reduce import rows_key
from pipeline.registry import statistics
from pipeline.report.dictionary import all_columns
from pipeline.store import Store
from pipeline.tables import arrow_table

DATA, SPLIT, CLASSES = "made", "test", 10
TABLES = ("models", "sites", "neurons")


@dataclass(frozen=True)
class Made:
    """How large a store is: every run has its own models, every model `sites` sites of `units` units each."""

    runs: int
    models: int
    sites: int
    units: int

    @property
    def rows(self) -> int:
        """Rows of `neurons`."""
        return self.runs * self.models * self.sites * self.units

    def run(self, number: int) -> str:
        """The id of a run."""
        return digest(["run", number], length=16)

    def names(self, number: int) -> list[str]:
        """The names of a run's models."""
        return [f"mlp-{number * self.models + index}" for index in range(self.models)]


def model_id(name: str) -> str:
    """The id of a model."""
    return digest(["model", name])


def write_store(store: Store, made: Made, *, writers: int = 2) -> Iterator[str]:
    """Commit run after run, and yield each one's id once it is committed."""
    columns = {table: all_columns()[table] for table in TABLES}
    with ThreadPoolExecutor(writers) as pool:
        yield from pool.map(lambda number: _write_run(store, made, number, columns), range(made.runs))


def _write_run(store: Store, made: Made, number: int, columns: Mapping[str, Sequence[Column]]) -> str:
    run = made.run(number)
    reduced = {}
    for name in made.names(number):
        sizes = {}
        for table in TABLES:
            content = arrow_bytes(_table(made, run, name, table, columns[table]))
            store.put_once(rows_key(run, model_id(name), table), content)
            sizes[table] = {"rows": _rows(made, table), "bytes": len(content)}
        reduced[model_id(name)] = sizes
    files = [run_pack(task, store) for task in pack_tasks(run, reduced)]
    manifest = Manifest(
        run=run,
        name="made",
        job={"name": "made", "number": number},
        models=tuple(sorted(reduced)),
        failed=(),
        coverage={f"{DATA}/{SPLIT}": Coverage(total=1000, read=1000)},
        versions=versions(),
        statistics={name: one.identity for name, one in statistics().items()},
        files=tuple(sorted(files, key=lambda file: file.key)),
    )
    for model, sizes in reduced.items():
        for table in sizes:
            store.remove(rows_key(run, model, table))  # as gc would
    store.put_once(manifest_key(run), encode(manifest))
    return run


def _rows(made: Made, table: str) -> int:
    return {"models": 1, "sites": made.sites, "neurons": made.sites * made.units}[table]


def _table(made: Made, run: str, name: str, table: str, columns: Sequence[Column]) -> pa.Table:
    count = _rows(made, table)
    draw = np.random.default_rng(int(digest(["values", name, table], length=8), 16))
    known: dict[str, Any] = {
        "run": run,
        "model": model_id(name),
        "name": name,
        "data": DATA,
        "split": SPLIT,
        "family": "mlp",
        "status": "ok",
        "site": [f"hidden{index * made.sites // count}" for index in range(count)],
        "unit": np.arange(count) % made.units,
    }
    values = {
        column.name: known.get(column.name) if column.name in known else _drawn(column, count, draw)
        for column in columns
    }
    return arrow_table(table, columns, values)


def _drawn(column: Column, count: int, draw: np.random.Generator) -> Any:
    match column.dtype:
        case "float32" | "float64":
            return draw.normal(size=count)
        case "int32" | "int64" if "class" in column.name:
            return draw.integers(0, CLASSES, count)
        case "int32" | "int64":
            return draw.integers(0, 60_000, count)
        case "bool":
            return draw.random(count) < 0.1
        case "string":
            return [f"{column.name} {number}" for number in draw.integers(0, 5, count)]
        case "list<string>":
            return [[f"{column.name} {number}" for number in draw.integers(0, 5, 3)] for _ in range(count)]
        case _:
            return [draw.integers(1, 8, 3).tolist() for _ in range(count)]
