"""SQL over the committed runs of a store: DuckDB in this process, on a directory or a bucket, without any download.

Layer 5. Views: `runs`; of every table the latest committed run of each (model, data set), and as `<table>_all` those of
every run. The connection sees the files of committed runs and nothing else, can write nothing, and is locked so.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from pipeline.base_columns import BASE
from pipeline.catalogue import Catalogue, published_runs, read_catalogue
from pipeline.errors import CensusError, StoreError, nearest
from pipeline.manifest import Committed, File, Manifest
from pipeline.published import PROTOCOL, PublishedFiles
from pipeline.store import Store

Connection = duckdb.DuckDBPyConnection
Pair = tuple[str, str]

_SQL_TYPE = {
    "int32": "INTEGER",
    "int64": "BIGINT",
    "float32": "FLOAT",
    "float64": "DOUBLE",
    "string": "VARCHAR",
    "bool": "BOOLEAN",
    "timestamp": "TIMESTAMPTZ",
    "list<float32>": "FLOAT[]",
    "list<int64>": "BIGINT[]",
    "list<string>": "VARCHAR[]",
}
_QUESTIONS = {"SELECT", "EXPLAIN", "MULTI", "PRAGMA"}  # PIVOT is parsed as MULTI
_READ_ONLY = "expected one question (SELECT …): tables of committed runs are never written"
_FETCH_ROWS = 1000
INTERRUPT_AGAIN_S = 0.1


class QueryError(CensusError):
    """A question is not SQL, or asks for what does not exist: whoever typed it must act."""


@dataclass(frozen=True)
class Answer:
    """The columns of a result, and its rows, which are computed as they are taken."""

    columns: tuple[str, ...]
    rows: Iterator[tuple[Any, ...]]


def connect(store: Store, *, run: str | None = None, tables: Collection[str] | None = None) -> Connection:
    """Open every table of a store's committed runs as views; of one run alone if given the beginning of its id.

    The notebook's entrance: `connect(open_store("census")).sql("FROM neurons LIMIT 5").df()`. Data frames can be
    registered and joined. `tables` opens those of them alone, unless there is none of them. StoreError if there is no
    committed run; QueryError if not exactly one begins with `run`.
    """
    catalogue = read_catalogue(store)
    runs = chosen_runs(store, run, catalogue)
    files = {file.key: file for manifest, _ in runs for file in manifest.files}
    con = duckdb.connect(config={"autoinstall_known_extensions": False, "autoload_known_extensions": False})
    con.register_filesystem(_published(store, files, catalogue))
    with _explained():
        _create_runs(con, runs)
        latest = _latest(con, runs)
        present = {file.table for file in files.values()}
        known = present | BASE.keys()
        wanted = known.intersection(tables) if tables is not None else known
        wanted = wanted or known  # SHOW TABLES names none
        for table in sorted(wanted & present):
            _create_views(con, table, runs, latest)
        _create_absent(con, wanted - present)
        _lock(con)
    return con


def tables_in(sql: str) -> set[str]:
    """Every word of a question that may be the name of a table; opening one table too many does no harm.

    >>> sorted(tables_in("FROM Neurons JOIN models_all USING (run)"))
    ['from', 'join', 'models', 'neurons', 'run', 'using']
    """
    return {word.removesuffix("_all") for word in re.findall(r"\w+", sql.lower())}


def _published(store: Store, files: Mapping[str, File], catalogue: Catalogue | None) -> PublishedFiles:
    sizes = {key: file.bytes for key, file in files.items()}
    return PublishedFiles(store, sizes, (lambda key: catalogue.pieces(files[key])) if catalogue else lambda _: ())


def chosen_runs(store: Store, prefix: str | None = None, catalogue: Catalogue | None = None) -> list[Committed]:
    """Every committed run with its time, oldest first; the one whose id begins with `prefix` if that is given."""
    runs = {one.manifest.run: one for one in published_runs(store, catalogue)}
    return [runs[one] for one in among(store, list(runs), prefix)]


def among(store: Store, runs: Sequence[str], prefix: str | None) -> list[str]:
    """Those of a store's committed runs that are asked for: all, or the one whose id begins with `prefix`."""
    if not runs:
        raise StoreError(f"{store.url}: holds no committed run; `neuron-census run JOB.toml --store …` makes one")
    found = [run for run in runs if run.startswith(prefix or "")]
    if prefix is None or len(found) == 1:
        return found
    if found:
        raise QueryError(f"run {prefix!r} is ambiguous: {', '.join(found)}")
    raise QueryError(f"no committed run begins with {prefix!r}: {nearest(prefix, runs)}")


def ask(con: Connection, sql: str, parameters: Sequence[Any] | Mapping[str, Any] = ()) -> Answer:
    """Answer one question. QueryError with DuckDB's own hint if it is wrong; StoreError if a table cannot be read.

    Columns of one name are renamed as `told_apart` says.
    """
    with _explained():
        _check(con, sql)
        cursor = con.cursor()
        _execute(cursor, sql, parameters)
        columns = told_apart([column[0] for column in cursor.description or ()])
    return Answer(columns, _fetched(cursor))


def told_apart(names: Sequence[str]) -> tuple[str, ...]:
    """Number the later columns of a name, as DuckDB does in a table made of them, by numbers that no column has.

    To DuckDB, and Spark, case tells no names apart.

    >>> told_apart(["name", "train_loss", "name", "Name", "name_1"])
    ('name', 'train_loss', 'name_2', 'Name_3', 'name_1')
    """
    taken = {name.lower() for name in names}
    seen: set[str] = set()
    found = []
    for name in names:
        own, number = name, 1
        if own.lower() in seen:
            while (own := f"{name}_{number}").lower() in taken:
                number += 1
        taken.add(own.lower())
        seen.add(own.lower())
        found.append(own)
    return tuple(found)


def _execute(cursor: Connection, sql: str, parameters: Sequence[Any] | Mapping[str, Any]) -> None:
    """Execute in a thread of its own: in the main one, DuckDB loses a Ctrl-C that comes before its first rows."""
    with ThreadPoolExecutor(1) as pool:
        executed = pool.submit(cursor.execute, sql, parameters or None)
        try:
            executed.result()
        except KeyboardInterrupt:
            while not executed.done():
                cursor.interrupt()
                wait([executed], timeout=INTERRUPT_AGAIN_S)
            raise


def ask_arrow(con: Connection, sql: str) -> Any:
    """The same answer as a pyarrow.RecordBatchReader."""
    with _explained():
        _check(con, sql)
        reader = con.sql(sql).to_arrow_reader()
    names = told_apart(reader.schema.names)
    if names == tuple(reader.schema.names):
        return reader
    schema = pa.schema([field.with_name(name) for field, name in zip(reader.schema, names, strict=True)])
    return pa.RecordBatchReader.from_batches(schema, (batch.rename_columns(names) for batch in reader))


def _check(con: Connection, sql: str) -> None:
    statements = con.extract_statements(sql)
    if len(statements) != 1:
        raise QueryError(f"{'no' if not statements else len(statements)} questions: expected one (SELECT …)")
    if statements[0].type.name not in _QUESTIONS:
        raise QueryError(_READ_ONLY)


def _fetched(cursor: Connection) -> Iterator[tuple[Any, ...]]:
    try:
        with _explained():
            while rows := cursor.fetchmany(_FETCH_ROWS):
                yield from rows
    finally:
        cursor.close()


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except duckdb.Error as error:
        text = str(error).strip()
        if "PermissionError: " in text:
            raise QueryError(_READ_ONLY) from error
        # without DuckDB's excerpt of the SQL, and of what the file system raised without its stack
        said = text.split("\n\nLINE ")[0].strip().splitlines()[-1]
        if said.startswith("KeyboardInterrupt"):  # it came while the file system was reading
            raise KeyboardInterrupt from error
        if _is_of_a_file(error, text, said):
            hint = (
                "run `neuron-census verify`, which says what is missing or changed; what cannot be restored is made "
                "again by its job, once the run's folder is removed"
            )
            raise StoreError(f"a table cannot be read: {said}; {hint}") from error
        raise QueryError(_with_nearest_table(text)) from error
    except RuntimeError as error:
        # DuckDB's answer to Ctrl-C
        raise KeyboardInterrupt from error


def _is_of_a_file(error: duckdb.Error, text: str, said: str) -> bool:
    """Whether a file is at fault and not the question: DuckDB has no kind of its own for errors of decoding."""
    kind = type(error)
    return text.startswith("Traceback") or kind in (duckdb.IOException, duckdb.Error) or f"{PROTOCOL}://" in said


def _with_nearest_table(text: str) -> str:
    missing = re.search(r"Table with name (\S+) does not exist", text)
    if missing is None:
        return text
    return f"there is no table {missing[1]!r}: {nearest(missing[1], [*BASE, 'runs'])}, each also as <table>_all"


def _create_runs(con: Connection, runs: Sequence[Committed]) -> None:
    columns: dict[str, tuple[str, list[Any]]] = {
        "run": ("VARCHAR", [manifest.run for manifest, _ in runs]),
        "name": ("VARCHAR", [manifest.name for manifest, _ in runs]),
        "committed": ("TIMESTAMP", [when.astimezone(UTC).replace(tzinfo=None) for _, when in runs]),
        "models": ("BIGINT", [len(manifest.models) for manifest, _ in runs]),
        "failed": ("BIGINT", [len(manifest.failed) for manifest, _ in runs]),
        "rows_read": ("BIGINT", [sum(one.read for one in manifest.coverage.values()) for manifest, _ in runs]),
        "splits": ("VARCHAR", [", ".join(sorted(manifest.coverage)) for manifest, _ in runs]),
        "statistics": ("VARCHAR", [", ".join(sorted(manifest.statistics)) for manifest, _ in runs]),
        "bytes": ("BIGINT", [sum(file.bytes for file in manifest.files) for manifest, _ in runs]),
        "version": ("VARCHAR", [manifest.versions.get("neuron-census") for manifest, _ in runs]),
    }
    con.execute("CREATE SCHEMA internal")
    _create_table(con, "internal.runs", columns)
    con.execute("CREATE VIEW runs AS SELECT * FROM internal.runs ORDER BY committed, run")


def _create_table(con: Connection, name: str, columns: Mapping[str, tuple[str, list[Any]]]) -> None:
    # one list for each column: rows one by one are 100 times slower
    taken = ", ".join(f"unnest(?::{kind}[]) AS {column}" for column, (kind, _) in columns.items())
    con.execute(f"CREATE TABLE {name} AS SELECT {taken}", [values for _, values in columns.values()])


@dataclass(frozen=True)
class _Latest:
    """Runs all of whose rows are the latest, and runs of which internal.latest says what is."""

    whole: frozenset[str]
    partly: frozenset[str]


def _latest(con: Connection, runs: Sequence[Committed]) -> _Latest:
    """Find the latest run of each (model, data set); `runs` is in order of commit.

    One in which the model failed is the latest only where it failed in all.
    """
    measured = _measured(con, [manifest for manifest, _ in runs])
    failed = {(manifest.run, one.model) for manifest, _ in runs for one in manifest.failed}
    found = [(pair, manifest.run) for manifest, _ in runs for pair in measured[manifest.run]]
    last = dict(sorted(found, key=lambda one: (one[1], one[0][0]) not in failed))
    won = {run: [pair for pair in pairs if last[pair] == run] for run, pairs in measured.items()}
    whole = frozenset(run for run, pairs in won.items() if len(pairs) == len(measured[run]))
    partly = frozenset(run for run, pairs in won.items() if pairs) - whole
    rows = [(run, *pair) for run in sorted(partly) for pair in won[run]]
    columns = {name: ("VARCHAR", [row[index] for row in rows]) for index, name in enumerate(("run", "model", "data"))}
    _create_table(con, "internal.latest", columns)
    return _Latest(whole, partly)


def _measured(con: Connection, manifests: Sequence[Manifest]) -> dict[str, set[Pair]]:
    """The pairs of (model, data set) of each run."""
    names = {one.run: {name.rsplit("/", 1)[0] for name in one.coverage} for one in manifests}
    # only the table says which model belongs to which of several data sets, and to which one that failed
    asked = [one for one in manifests if (len(names[one.run]) != 1 or one.failed) and one.files_of("models")]
    files = [file for manifest in asked for file in manifest.files_of("models")]
    found: dict[str, set[Pair]] = {manifest.run: set() for manifest in asked}
    if files:
        for run, *pair in con.execute(
            f"SELECT DISTINCT run, model, data FROM read_parquet({_paths(files)})"
        ).fetchall():
            found[run].add((pair[0], pair[1]))
    return found | {
        one.run: {(model, name) for model in one.models for name in names[one.run]}
        for one in manifests
        if one.run not in found
    }


def _create_views(con: Connection, table: str, runs: Sequence[Committed], latest: _Latest) -> None:
    schema = _schema(con, table, runs)
    every = [file for manifest, _ in runs for file in manifest.files_of(table)]
    whole = [file for manifest, _ in runs if manifest.run in latest.whole for file in manifest.files_of(table)]
    partly = [file for manifest, _ in runs if manifest.run in latest.partly for file in manifest.files_of(table)]
    parts = []
    if whole:
        parts.append(f"SELECT * FROM read_parquet({_paths(whole)}, schema = {schema})")
    if partly:
        scan = f"SELECT * FROM read_parquet({_paths(partly)}, schema = {schema})"
        parts.append(f"{scan} SEMI JOIN internal.latest USING (run, model, data)")
    con.execute(f'CREATE VIEW "{table}_all" AS SELECT * FROM read_parquet({_paths(every)}, schema = {schema})')
    con.execute(f'CREATE VIEW "{table}" AS {" UNION ALL ".join(parts) or f"""FROM "{table}_all" WHERE false"""}')


def _schema(con: Connection, table: str, runs: Sequence[Committed]) -> str:
    """The columns that any run has, as an argument of read_parquet: without it, every view opens every file.

    Runs of the same statistics by the same version have the same columns, so one footer of each is read.
    """
    samples: dict[tuple[Any, ...], File] = {}
    for manifest, _ in runs:
        for file in manifest.files_of(table)[:1]:
            samples[manifest.versions.get("neuron-census"), *sorted(manifest.statistics.items())] = file
    found = con.execute(
        f"DESCRIBE FROM read_parquet({_paths(list(samples.values()))}, union_by_name = true)"
    ).fetchall()
    fields = [
        f"{_quoted(name)}: {{'name': {_quoted(name)}, 'type': {_quoted(kind)}, 'default_value': NULL}}"
        for name, kind, *_ in found
    ]
    return f"MAP {{{', '.join(fields)}}}"


def _create_absent(con: Connection, tables: set[str]) -> None:
    """Create an empty view of each table that no run has, with the columns that it would have."""
    if not tables:
        return
    from pipeline.report.dictionary import all_columns  # imports torch, 2 s: only where a table is absent

    known = all_columns()
    for table in sorted(tables):
        columns = ", ".join(f'NULL::{_SQL_TYPE[column.dtype]} AS "{column.name}"' for column in known[table])
        for name in (table, f"{table}_all"):
            con.execute(f'CREATE VIEW "{name}" AS SELECT {columns} WHERE false')


def _lock(con: Connection) -> None:
    # sorts larger than memory go to a directory of the system's, never to the working directory
    spill = Path(tempfile.gettempdir(), f"neuron-census-duckdb-{os.getuid()}")
    con.execute(f"SET temp_directory = {_quoted(str(spill))}")
    con.execute(f"SET allowed_directories = ['{PROTOCOL}://']")
    con.execute("SET enable_external_access = false")
    con.execute("SET lock_configuration = true")


def _paths(files: Sequence[File]) -> str:
    return f"[{', '.join(_quoted(f'{PROTOCOL}://{file.key}') for file in files)}]"


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
