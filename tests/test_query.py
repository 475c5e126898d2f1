"""SQL over committed runs: which rows a view holds, on any store; that nothing can be written; what is read."""

from __future__ import annotations

import doctest
import io
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import query
from pipeline.base_columns import BASE
from pipeline.columns import Column
from pipeline.errors import StoreError
from pipeline.manifest import Coverage, File, Manifest, encode, manifest_key
from pipeline.published import PublishedFiles
from pipeline.query import Connection, QueryError, ask, ask_arrow, connect, tables_in
from pipeline.report import printing
from pipeline.report.dictionary import all_columns
from pipeline.store import Store, open_store
from tests.handmade import model_id, write_run


@contextmanager
def opened(store: Store, **options: Any) -> Iterator[Connection]:
    with closing(connect(store, **options)) as con:
        yield con


def answers(store: Store, sql: str, **options: Any) -> list[tuple[Any, ...]]:
    with opened(store, **options) as con:
        return list(ask(con, sql).rows)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """An older run of two pairs of models, and a newer one of one of the pairs."""
    store = open_store(str(tmp_path_factory.mktemp("store")))
    write_run(store, "old", ("mlp-0", "mlp-0-init", "cnn-0", "cnn-0-init"))
    write_run(store, "young", change={"z_mean": 1.0})
    return store


@pytest.fixture(scope="module")
def shared(store: Store) -> Iterator[Connection]:
    with opened(store) as con:
        yield con


def test_a_view_holds_the_latest_run_of_each_model(store: Store) -> None:
    sql = "SELECT DISTINCT models.name, run, z_mean FROM neurons JOIN models USING (run, model) ORDER BY ALL"
    assert answers(store, sql) == [
        ("cnn-0", "old", -0.5),
        ("cnn-0-init", "old", -0.5),
        ("mlp-0", "young", 1.0),
        ("mlp-0-init", "young", 1.0),
    ]


def test_the_all_view_holds_every_run(store: Store) -> None:
    assert answers(store, "SELECT run, count(*) FROM neurons_all GROUP BY run ORDER BY run") == [
        ("old", 28),
        ("young", 14),
    ]


def test_runs_are_listed_in_order_of_their_commits(store: Store) -> None:
    rows = answers(store, "SELECT run, name, models, failed, rows_read, splits FROM runs")
    assert rows == [("old", "handmade", 4, 0, 90, "digits/test"), ("young", "handmade", 2, 0, 90, "digits/test")]


def test_one_run_alone(store: Store) -> None:
    assert answers(store, "SELECT DISTINCT run FROM neurons", run="o") == [("old",)]
    with pytest.raises(QueryError, match=r"no committed run begins with 'yuong': did you mean 'young'\?"):
        connect(store, run="yuong")


def test_an_ambiguous_run_is_refused(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    write_run(store, "aa")
    write_run(store, "ab")
    with pytest.raises(QueryError, match="ambiguous: aa, ab"):
        connect(store, run="a")


def test_of_runs_of_the_same_time_the_greater_id_is_the_latest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(str(tmp_path))
    for run in ("b", "a"):
        write_run(store, run)
    same = datetime(2026, 1, 1, tzinfo=UTC)
    modified = store.modified
    monkeypatch.setattr(store, "modified", lambda prefix="": dict.fromkeys(modified(prefix), same))
    assert answers(store, "SELECT DISTINCT run FROM models") == [("b",)]


def test_a_run_on_other_data_does_not_hide_an_older_one(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    write_run(store, "a", data="digits")
    write_run(store, "b", data="letters")
    assert answers(store, "SELECT DISTINCT data, run FROM neurons ORDER BY ALL") == [("digits", "a"), ("letters", "b")]


def test_of_a_run_on_several_data_sets_only_the_measured_pairs_count(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    write_run(store, "a", data="letters")
    # the newer run knows the data set `letters`, but measured these models on `digits` alone
    both = {f"{name}/test": Coverage(total=10, read=10) for name in ("digits", "letters")}
    write_run(store, "b", data="digits", coverage=both)
    assert answers(store, "SELECT DISTINCT data, run FROM neurons ORDER BY ALL") == [("digits", "b"), ("letters", "a")]


def test_a_run_on_several_data_sets_hides_an_older_one_on_one(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    write_run(store, "a", data="digits")
    both = {f"{name}/test": Coverage(total=10, read=10) for name in ("digits", "letters")}
    write_run(store, "b", data="digits", coverage=both)
    assert answers(store, "SELECT DISTINCT data, run FROM neurons") == [("digits", "b")]


@pytest.mark.parametrize("names", [("mlp-0-init",), ()])
def test_a_run_in_which_a_model_failed_hides_none_in_which_it_did_not(tmp_path: Path, names: tuple[str, ...]) -> None:
    store = open_store(str(tmp_path))
    write_run(store, "a", tables=("models", "neurons"))
    write_run(store, "b", names, tables=("models", "neurons")[: 1 + len(names)], failed={"mlp-0": "no", "cnn-0": "bad"})
    latest = "SELECT name, run, status, reason FROM models ORDER BY name"
    assert answers(store, latest) == [
        ("cnn-0", "b", "failed", "bad"),
        ("mlp-0", "a", "ok", None),
        ("mlp-0-init", "b" if names else "a", "ok", None),
    ]
    assert answers(store, f"SELECT DISTINCT run FROM neurons WHERE model = '{model_id('mlp-0')}'") == [("a",)]
    write_run(store, "c", ("mlp-0", "cnn-0"), tables=("models", "neurons"))
    assert [(name, run) for name, run, *_ in answers(store, latest)][:2] == [("cnn-0", "c"), ("mlp-0", "c")]


def test_columns_that_only_some_runs_have_are_null_elsewhere(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    write_run(store, "a", ("mlp-0",))
    write_run(store, "b", ("cnn-0",), change={"later": 2.5}, more=[Column("later", "float64", "of a newer version")])
    rows = answers(store, "SELECT DISTINCT run, later, n FROM neurons ORDER BY run")
    assert rows == [("a", None, 100), ("b", 2.5, 100)]


def test_a_table_that_no_run_has_is_an_empty_view_with_its_columns(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    write_run(store, "a", tables=("models", "sites", "neurons"))
    with opened(store) as con:
        for table, columns in all_columns().items():
            if table in BASE and table not in ("models", "sites", "neurons"):
                answer = ask(con, f"FROM {table}")
                assert answer.columns == tuple(column.name for column in columns)
                assert list(answer.rows) == []
        assert len(list(ask(con, "SHOW TABLES").rows)) == 2 * len(BASE) + 1


def test_a_store_without_runs_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"holds no committed run; `neuron-census run JOB\.toml"):
        connect(open_store(str(tmp_path / "nothing")))
    assert not (tmp_path / "nothing").exists()


def test_uncommitted_tables_are_invisible(store: Store, tmp_path: Path) -> None:
    held = open_store(str(tmp_path))
    write_run(held, "a", ("mlp-0",))
    manifest = Path(held.url, manifest_key("a"))
    kept = manifest.read_bytes()
    write_run(held, "b", ("cnn-0",))
    Path(held.url, manifest_key("b")).unlink()
    assert answers(held, "SELECT DISTINCT run FROM neurons_all") == [("a",)]
    assert manifest.read_bytes() == kept


@pytest.mark.parametrize(
    "sql",
    [
        "CREATE TABLE mine AS FROM neurons",
        "DROP VIEW neurons",
        "COPY neurons TO '{outside}/x.csv'",
        "COPY neurons TO '{inside}/x.csv'",
        "COPY neurons TO 'census://runs/x.csv'",
        # DuckDB parses a COPY in a common table expression as a SELECT
        "WITH x AS (COPY (SELECT 1) TO '{outside}/x.csv') FROM x",
        "WITH x AS (COPY (SELECT 1) TO '{inside}/x.csv') FROM x",
        "WITH x AS (COPY (SELECT 1) TO 'census://runs/x.csv') FROM x",
        "WITH x AS (COPY (SELECT 1) TO 'census://{part}') FROM x",
        "EXPLAIN ANALYZE COPY (SELECT 1) TO '{inside}/x.csv'",
        "ATTACH '{inside}/x.db'",
        "ATTACH 'census://x.db'",
        "EXPORT DATABASE '{inside}/x'",
        "INSTALL httpfs",
        "SET enable_external_access = true",
        "SELECT 1; DROP VIEW neurons",
        "FROM read_text('/etc/hostname')",
        "FROM glob('/*')",
        "FROM sniff_csv('/etc/passwd')",
        "FROM read_parquet('{inside}/{part}')",
        "FROM '{inside}/{part}'",
        "",
    ],
)
def test_nothing_is_written_and_nothing_else_is_read(
    store: Store, shared: Connection, tmp_path: Path, sql: str
) -> None:
    part = store.keys("runs/old/tables/neurons/")[0]
    before = store.modified()
    with pytest.raises((QueryError, StoreError)):
        list(ask(shared, sql.format(outside=tmp_path, inside=store.url, part=part)).rows)
    assert list(tmp_path.iterdir()) == []
    assert store.modified() == before
    assert sorted(path.name for path in Path(store.url).iterdir()) == ["models", "runs", "states"]


def test_mistakes_are_explained(store: Store) -> None:
    with opened(store) as con:
        with pytest.raises(QueryError, match=r"there is no table 'neuron': did you mean 'neurons'\?"):
            ask(con, "FROM neuron")
        with pytest.raises(QueryError, match=r"(?s)Referenced column \"fire_rat\" not found.*\"fire_rate\""):
            ask(con, "SELECT fire_rat FROM neurons")
        with pytest.raises(QueryError, match=r"(?s)syntax error at or near \"selec\".*LINE 1"):
            ask(con, "selec 1")
        with pytest.raises(QueryError, match="Could not convert"):
            list(ask(con, "SELECT site::INTEGER FROM neurons").rows)


def test_a_question_that_failed_leaves_the_connection_usable(store: Store) -> None:
    with opened(store) as con:
        begun = ask(con, "FROM neurons_all")
        next(begun.rows)
        with pytest.raises(QueryError):
            ask(con, "selec 1")
        assert list(ask(con, "SELECT count(*) FROM neurons").rows) == [(28,)]


def test_pivot_describe_explain_and_parameters(store: Store) -> None:
    with opened(store) as con:
        assert ask(con, "PIVOT neurons ON site USING count(*) GROUP BY run").columns == ("run", "head", "layers.0")
        assert ("template_cos", "DOUBLE") in [row[:2] for row in ask(con, "DESCRIBE neurons").rows]
        assert list(ask(con, "EXPLAIN FROM neurons").rows)
        counted = ask(con, "SELECT count(*) FROM neurons WHERE model = $model", {"model": model_id("mlp-0")})
        assert list(counted.rows) == [(7,)]


def test_null_nan_and_zero_stay_apart(store: Store) -> None:
    sql = (
        "SELECT DISTINCT site, unit, template_cos, fire_rate FROM neurons WHERE run = 'young' AND unit = 1 ORDER BY ALL"
    )
    rows = answers(store, sql)
    head, dead = rows[0], rows[-1]
    assert head[3] is None
    assert dead[3] == 0
    assert np.isnan(dead[2])


def test_data_frames_can_be_joined(store: Store) -> None:
    names = pd.DataFrame({"class": [0, 1, 2], "label": ["zero", "one", "two"]})
    with opened(store) as con:
        con.register("names", names)
        rows = con.sql("SELECT DISTINCT label FROM neurons JOIN names ON class = best_class ORDER BY 1").df()
    assert rows["label"].tolist() == ["one", "two", "zero"]


def test_arrow(store: Store) -> None:
    with opened(store) as con:
        table = ask_arrow(
            con,
            "SELECT unit, template_cos, weight FROM neurons JOIN patterns USING (run, model, data, split, site, unit)",
        ).read_all()
    assert table.num_rows == 28
    assert table.schema.types[:2] == [pa.int32(), pa.float64()]
    assert pa.types.is_list(table.schema.types[2])


def test_only_named_tables_are_opened(store: Store) -> None:
    with opened(store, tables={"sites"}) as con:
        assert [name for (name,) in ask(con, "SHOW TABLES").rows] == ["runs", "sites", "sites_all"]
    with opened(store, tables=tables_in("PIVOT neurons ON site USING count(*)")) as con:
        assert [name for (name,) in ask(con, "SHOW TABLES").rows] == ["neurons", "neurons_all", "runs"]
    with opened(store, tables=tables_in("SHOW TABLES")) as con:
        assert len(list(ask(con, "SHOW TABLES").rows)) > 10


def test_object_storage_gives_the_same_answers(store: Store, s3_url: str) -> None:
    bucket = open_store(s3_url)
    write_run(bucket, "old", ("mlp-0", "mlp-0-init", "cnn-0", "cnn-0-init"))
    write_run(bucket, "young", change={"z_mean": 1.0})
    for sql in ("FROM neurons ORDER BY ALL", "FROM patterns ORDER BY model, site, unit", "FROM sites_all ORDER BY ALL"):
        assert repr(answers(bucket, sql)) == repr(answers(store, sql))


def test_an_interruption_while_a_file_is_read_is_one(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> bytes:
        raise KeyboardInterrupt

    monkeypatch.setattr(PublishedFiles, "_range", interrupted)
    with pytest.raises(KeyboardInterrupt):
        answers(store, "SELECT avg(z_mean) FROM neurons")


def test_a_lost_file_is_the_stores_fault(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    write_run(store, "a")
    store.remove("runs/a/tables/neurons/part-00000.parquet")
    with pytest.raises(StoreError, match=r"a table cannot be read: .*neurons.*run `neuron-census verify`"):
        answers(store, "FROM neurons")
    assert len(answers(store, "FROM models", tables={"models"})) == 2


CHANGES = {
    "shorter": lambda content: content[:-10],
    "longer": lambda content: content + b"1",
    "other data": lambda content: content[:40] + bytes(1000) + content[1040:],
    "other footer": lambda content: content[:-4008] + b"?" * 4000 + content[-8:],
    "no Parquet": lambda content: bytes(len(content)),
    "empty": lambda _: b"",
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_file_that_was_changed_is_the_stores_fault(tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    store = open_store(str(tmp_path))
    write_run(store, "a")
    part = Path(store.url, "runs/a/tables/neurons/part-00000.parquet")
    part.write_bytes(change(part.read_bytes()))
    with pytest.raises(StoreError, match=r"a table cannot be read: .*run `neuron-census verify`, which says what"):
        answers(store, "FROM neurons")


class Counted:
    """What is asked of a store while it is queried."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reads: list[tuple[str, int]] = []
        made = PublishedFiles.__init__

        def counting(files: PublishedFiles, *arguments: Any) -> None:
            made(files, *arguments)
            files._files = self

        monkeypatch.setattr(PublishedFiles, "__init__", counting)

    def cat_file(self, path: str, *, start: int, end: int) -> bytes:
        self.reads.append((path, end - start))
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(end - start)


def test_views_of_many_runs_read_one_footer_of_each_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(str(tmp_path))
    for number in range(12):
        write_run(store, f"run-{number:02}", (f"mlp-{number}",), tables=("models", "sites", "neurons", "receipts"))
    counted = Counted(monkeypatch)
    with opened(store, tables=("models", "sites", "neurons", "receipts")) as con:
        assert len({path for path, _ in counted.reads}) == 4
        assert list(ask(con, "SELECT count(DISTINCT run) FROM neurons").rows) == [(12,)]


def test_a_run_that_is_the_latest_of_nothing_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(str(tmp_path))
    for run in ("a", "b", "c"):
        write_run(store, run)
    counted = Counted(monkeypatch)
    assert answers(store, "SELECT count(*), min(run) FROM neurons", tables={"neurons"}) == [(14, "c")]
    assert {path for path, _ in counted.reads} == {f"{store.url}/runs/c/tables/neurons/part-00000.parquet"}


def _wide_run(store: Store, *, rows: int, groups: int) -> None:
    """A run whose neurons are one file of many row groups, each of one model."""
    models = np.repeat([f"{number:032x}" for number in range(groups)], rows)
    values = np.random.default_rng(0).random((rows * groups, 8))
    columns: dict[str, Any] = {"run": ["wide"] * len(models), "model": models, "data": ["d"] * len(models)}
    table = pa.table(columns | {f"c{number}": values[:, number] for number in range(8)})
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=rows, compression="zstd")
    key = "runs/wide/tables/neurons/part-00000.parquet"
    stored = store.put_once(key, sink.getvalue())
    file = File("neurons", key, stored, len(sink.getvalue()), table.num_rows, models[0], models[-1])
    coverage = {"d/test": Coverage(total=1, read=1)}
    manifest = Manifest("wide", "wide", {}, tuple(models[::rows]), (), coverage, {}, {}, (file,))
    store.put_once(manifest_key("wide"), encode(manifest))


def test_threads_that_share_a_file_read_their_own_bytes(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.put_once("a", bytes(range(100)))
    file = PublishedFiles(store, {"a": 100}).open("census://a", "rb")

    def read(place: int) -> bytes:
        file.seek(place)
        everyone_has_sought.wait()
        return file.read(3)

    everyone_has_sought = threading.Barrier(4)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(read, [0, 30, 60, 90]))
    assert found == [bytes(range(place, place + 3)) for place in (0, 30, 60, 90)]


def test_a_selective_question_reads_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(str(tmp_path))
    _wide_run(store, rows=10_000, groups=20)
    size = sum(Path(store.url, key).stat().st_size for key in store.keys("runs/wide/tables/"))
    counted = Counted(monkeypatch)
    with opened(store, tables={"neurons"}) as con:
        assert list(ask(con, f"SELECT count(c1) FROM neurons WHERE model = '{7:032x}'").rows) == [(10_000,)]
    assert sum(length for _, length in counted.reads) < size / 10


def test_doctests() -> None:
    assert doctest.testmod(printing).failed == 0
    assert doctest.testmod(query).failed == 0
